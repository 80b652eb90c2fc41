"""Concepts per second of a training step with its optimizer, compared with other implementations of the model.

python benchmarks/train_step.py                                          # CPU: 512 wide, 8 layers, 16 x 128 concepts
python benchmarks/train_step.py --preset 1.6b --rows 7 --row-length 1024 --documents  # one GPU: the paper's model

The plain model is the same decoder written with nn.Linear and scaled_dot_product_attention, in fp32. Ours is measured
bare (model, loss, AdamW over fp32 master weights) and as `lcm-ds train` with ZeRO-1 on one rank, including loader,
noise and logging: that row's step is the one a run logs. --documents packs documents with FineWeb-Edu's lengths and
also measures padded batches (one document per row of 128). Base-LCM and `lcm-ds train` have dropout as in training
(--dropout), the others none, and the run is killed before it saves. On a GPU the rate of the largest bf16 product,
LlamaModel of transformers (sdpa, compiled) and the design of dame-cell/BaseLCM (nn.TransformerDecoderLayer that attends
to its own input), of the same size, are measured as well; on a CPU these two only on request. --ways chooses by name
what a short loan of a GPU has time for: --ways 'lcm-ds train, bf16, compiled' Llama.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from gpu.train import steps_of
from loader import write_dataset
from torch import Tensor, nn

from lcm_ds.config import ModelConfig
from lcm_ds.data.batch import target_mask
from lcm_ds.model import kernels
from lcm_ds.model.attention import Rope, SegmentLayout, rotate
from lcm_ds.model.config import BaseLCMConfig, resolve_model
from lcm_ds.model.flops import training_flops
from lcm_ds.model.modeling import BaseLCM
from lcm_ds.processes import keep_freed_memory
from lcm_ds.train.loss import squared_error
from lcm_ds.train.monitoring.throughput import peak_tflops

SMALL = {
    "embed_dim": 1024,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "intermediate_size": 1536,
}
MAX_SEGMENT = 128
# FineWeb-Edu's documents: 2951 characters in the median, 4753 in the mean (log-normal), 92 to a sentence.
MEDIAN_LENGTH, SPREAD = 2951 / 92, (2 * np.log(4753 / 2951)) ** 0.5

Step = Callable[[], None]
Measured = tuple[list[float], float]  # seconds of each step, peak memory in GiB


class Batch(NamedTuple):
    """The data of a step."""

    concepts: Tensor  # fp16 [rows, row_length, embed_dim]
    ids: Tensor  # int32 [rows, row_length]
    layout: SegmentLayout

    @property
    def real(self) -> int:
        return int((self.ids >= 0).sum())

    @property
    def pairs(self) -> int:
        return int((self.layout.positions + 1)[self.ids >= 0].sum())


def main() -> None:
    """Measure the alternatives and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", help="default: 512 wide, 8 layers, as in the docstring")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--row-length", type=int, default=128)
    parser.add_argument("--documents", action="store_true", help="FineWeb-Edu's lengths; default: a document per row")
    parser.add_argument("--dropout", type=float, default=0.1, help="of Base-LCM and lcm-ds train (default: 0.1)")
    parser.add_argument("--steps", type=int, default=10, help="measured steps, after three for warm-up")
    parser.add_argument("--ways", nargs="+", help="only alternatives whose name contains one of these")
    arguments = parser.parse_args()
    config = BaseLCMConfig(**SMALL, dropout=arguments.dropout)
    if arguments.preset:
        config = resolve_model(ModelConfig(preset=arguments.preset, dropout=arguments.dropout))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    if device.type == "cpu":
        keep_freed_memory()  # as in training
    lengths = document_lengths() if arguments.documents else [arguments.row_length] * arguments.rows
    packed = pack(lengths, arguments.rows, arguments.row_length, config, device)
    ways = ways_of(config, packed, arguments, device)
    wanted = arguments.ways or [""]
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; {matrix_rate(device)}")
    print(f"{config.sizes()}\n{packed.real:,} concepts in {arguments.rows} x {arguments.row_length}")
    print("| way | step (s, median) | concepts/s | x plain | peak memory (GiB) | MFU | processor time (s, median) |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    plain: float | None = None
    peak = peak_tflops(device, None)
    for name, (batch, make) in ways.items():
        if not any(part in name for part in wanted):
            continue
        seconds, memory, busy = measure(make, arguments.steps, device)
        speed = batch.real / seconds
        plain = speed if name.startswith("plain") and plain is None else plain
        mfu = training_flops(config, batch.real, batch.pairs) / seconds / peak / 1e12 if peak else None
        print(
            f"| {name} | {seconds:.4f} | {speed:,.0f} | {speed / plain if plain else float('nan'):.2f} "
            f"| {'' if memory is None else f'{memory:.1f}'} | {'' if mfu is None else f'{mfu:.1%}'} "
            f"| {'' if busy is None else f'{busy:.4f}'} |",
            flush=True,
        )


def ways_of(
    config: BaseLCMConfig, packed: Batch, arguments: argparse.Namespace, device: torch.device
) -> dict[str, tuple[Batch, Callable[[], Step | Measured]]]:
    """Name → the batch, and a function that makes a step to measure (or measures steps itself)."""
    half, exact = torch.bfloat16, torch.float32
    ways: dict[str, tuple[Batch, Callable[[], Step | Measured]]] = {
        "plain, fp32": (packed, lambda: bare(Plain(config), packed, exact, device)),
        "plain, fp32, compiled": (packed, lambda: bare(Plain(config), packed, exact, device, compiled=True)),
    }
    for dtype, name in ((exact, "fp32"), (half, "bf16")):
        for compiled in (False, True):
            suffix = ", compiled" if compiled else ""
            ways[f"Base-LCM, {name}{suffix}"] = (
                packed,
                lambda d=dtype, c=compiled: bare(BaseLCM(config).initialize(0), packed, d, device, c),
            )
            ways[f"lcm-ds train, {name}{suffix}"] = (
                packed,
                lambda n=name, c=compiled: trained(config, arguments, n, c),
            )
    if arguments.documents:
        padded = pad(packed, config, device)
        ways["Base-LCM, bf16, compiled, padded batches"] = (
            padded,
            lambda: bare(BaseLCM(config).initialize(0), padded, half, device, True),
        )
    if device.type == "cuda" or arguments.ways:
        ways["LlamaModel (sdpa, compiled), bf16"] = (packed, lambda: bare(Llama(config), packed, half, device, True))
        ways["BaseLCM's design, bf16"] = (packed, lambda: bare(Seed(config), packed, half, device))
    return ways


# --- models -----------------------------------------------------------------------------------------------------------


class PlainLayer(nn.Module):
    """The decoder layer with four plus three nn.Linear and SDPA."""

    def __init__(self, config: BaseLCMConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.head_dim = config.head_dim
        self.norm, self.mlp_norm = (nn.RMSNorm(size, config.rms_norm_eps) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(size, size) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(size, inner), nn.Linear(size, inner), nn.Linear(inner, size)

    def forward(self, x: Tensor, rope: Rope, layout: SegmentLayout) -> Tensor:
        y = self.norm(x)
        q, k, v = (project(y).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v))
        q, k, v = (tensor.transpose(1, 2) for tensor in (*rotate(q, k, rope), v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask, is_causal=layout.mask is None)
        x = x + self.o(y.transpose(1, 2).flatten(-2))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Ends(nn.Module):
    """Pre-net and post-net around the decoder of each model."""

    def __init__(self, config: BaseLCMConfig) -> None:
        super().__init__()
        self.config = config
        self.pre = nn.Linear(config.embed_dim, config.hidden_size)
        self.post = nn.Linear(config.hidden_size, config.embed_dim)

    def forward(self, concepts: Tensor, layout: SegmentLayout) -> Tensor:
        return self.post(self.decode(self.pre(concepts.to(self.pre.weight.dtype)), layout))

    def decode(self, hidden: Tensor, layout: SegmentLayout) -> Tensor:
        raise NotImplementedError


class Plain(Ends):
    """A straightforward Base-LCM."""

    def __init__(self, config: BaseLCMConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(PlainLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def decode(self, hidden: Tensor, layout: SegmentLayout) -> Tensor:
        layout = layout._replace(max_seqlen=hidden.shape[1])  # one mask over the row
        layout = layout.prepared(hidden.device, torch.float32, self.config.head_dim)
        rope = Rope.of(layout.positions, self.config.head_dim, self.config.rope_theta)
        for layer in self.layers:
            hidden = layer(hidden, rope, layout)
        return self.norm(hidden)


class Llama(Ends):
    """transformers' LlamaModel with concepts as token embeddings; causal over the row."""

    def __init__(self, config: BaseLCMConfig) -> None:
        from transformers import LlamaConfig, LlamaModel

        super().__init__(config)
        sizes = {name: getattr(config, name) for name in SMALL if name != "embed_dim"}
        self.model = LlamaModel(LlamaConfig(**sizes, vocab_size=8, attn_implementation="sdpa", use_cache=False))
        self.model.embed_tokens = nn.Identity()  # not used
        self.layers = self.model.layers

    def decode(self, hidden: Tensor, layout: SegmentLayout) -> Tensor:
        return self.model(inputs_embeds=hidden).last_hidden_state


class Seed(Ends):
    """Layers of nn.TransformerDecoder that attend to their own input, without a mask."""

    def __init__(self, config: BaseLCMConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                config.hidden_size, config.num_attention_heads, config.intermediate_size, 0.0, batch_first=True
            )
            for _ in range(config.num_hidden_layers)
        )

    def decode(self, hidden: Tensor, layout: SegmentLayout) -> Tensor:
        memory = hidden
        for layer in self.layers:
            hidden = layer(hidden, memory)
        return hidden


# --- data -------------------------------------------------------------------------------------------------------------


def document_lengths() -> list[int]:
    """Concepts of documents with FineWeb-Edu's lengths, in pieces of at most MAX_SEGMENT."""
    drawn = np.random.default_rng(0).lognormal(np.log(MEDIAN_LENGTH), SPREAD, 10_000)
    pieces = []
    for length in np.maximum(2, drawn.round()).astype(int).tolist():
        pieces += [MAX_SEGMENT] * (length // MAX_SEGMENT) + [length % MAX_SEGMENT] * (length % MAX_SEGMENT > 0)
    return pieces


def pack(lengths: list[int], rows: int, row_length: int, config: BaseLCMConfig, device: torch.device) -> Batch:
    """Full rows of segments, cut at the ends of rows."""
    ids = torch.empty(rows, row_length, dtype=torch.int32)
    coming = iter(lengths)
    rest = 0
    for row in ids:
        filled = number = 0
        while filled < row_length:
            rest = rest or next(coming)
            taken = min(rest, row_length - filled)
            row[filled : filled + taken] = number
            filled, number, rest = filled + taken, number + 1, rest - taken
    return batch_of(ids, config, device)


def pad(packed: Batch, config: BaseLCMConfig, device: torch.device) -> Batch:
    """The segments of a batch, each in a separate row."""
    ends = packed.layout.cu_seqlens.unique().diff().tolist()
    ids = torch.full((len(ends), MAX_SEGMENT), -1, dtype=torch.int32)
    for row, length in zip(ids, ends, strict=True):
        row[:length] = 0
    return batch_of(ids, config, device)


def batch_of(ids: Tensor, config: BaseLCMConfig, device: torch.device) -> Batch:
    concepts = torch.randn(*ids.shape, config.embed_dim, dtype=torch.float16).to(device)
    layout = SegmentLayout.from_ids(ids, min(MAX_SEGMENT, ids.shape[1]))
    return Batch(concepts, ids, layout)


# --- measuring --------------------------------------------------------------------------------------------------------


def bare(
    model: nn.Module,
    batch: Batch,
    dtype: torch.dtype,
    device: torch.device,
    compiled: bool = False,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
) -> Step:
    """A step of the model: loss, gradients, AdamW over fp32 weights.

    Args:
        model: To train.
        batch: The data of every step.
        dtype: Of weights, activations and gradients.
        device: Where it is trained.
        compiled: Whether its layers are compiled.
        wrap: Makes what is called instead of the model, such as torch's DistributedDataParallel.

    Returns:
        The step.
    """
    model = model.to(device, dtype).train()
    if compiled:
        for layer in model.layers:
            layer.compile()
    chosen: dict[str, str] = {}  # as a run would choose them
    if isinstance(model, BaseLCM) and device.type == "cpu":
        chosen, reasons = kernels.measure(model.config, *batch.ids.shape, batch.layout.max_seqlen, dtype, {})
        print("".join(f"{reason}\n" for reason in reasons), end="", file=sys.stderr)
    kernels.use(chosen)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masters = parameters if dtype is torch.float32 else [p.detach().float().requires_grad_() for p in parameters]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)
    mask = target_mask(batch.ids.to(device))
    share = 1 / int(mask.sum())
    dropout = {"dropout_keys": torch.arange(len(batch.ids), device=device)} if isinstance(model, BaseLCM) else {}
    called = model if wrap is None else wrap(model)

    def step() -> None:
        predictions = called(batch.concepts, batch.layout, **dropout)
        (squared_error(predictions, batch.concepts[:, 1:].float(), mask) * share).backward()
        if masters is not parameters:
            for master, parameter in zip(masters, parameters, strict=True):
                master.grad = parameter.grad.float()
                parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        if masters is not parameters:
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)

    return step


def measure(
    make: Callable[[], Step | Measured], steps: int, device: torch.device
) -> tuple[float, float | None, float | None]:
    """Median seconds of a step, the device's peak memory in GiB (None on a CPU), median processor seconds of a step.

    With OMP_NUM_THREADS=1 other processes hardly change the processor time; it is None for `lcm-ds train` and on GPUs.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    made = make()
    if isinstance(made, tuple):
        seconds, memory = made
        return statistics.median(seconds[3:]), memory if device.type == "cuda" else None, None
    times, busy = [], []
    for _ in range(steps + 3):
        started, busy_before = time.perf_counter(), time.process_time()
        made()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        busy.append(time.process_time() - busy_before)
    if device.type == "cuda":
        return statistics.median(times[3:]), torch.cuda.max_memory_allocated() / 2**30, None
    return statistics.median(times[3:]), None, statistics.median(busy[3:])


def trained(config: BaseLCMConfig, arguments: argparse.Namespace, precision: str, compiled: bool) -> Measured:
    """The steps of `lcm-ds train` on random concepts, as logged."""
    with tempfile.TemporaryDirectory() as folder:
        # Documents as long as a row, or of 5 to 100 concepts.
        exact = None if arguments.documents else arguments.row_length
        write_dataset(Path(folder, "data"), 50_000, config.embed_dim, 100, exact)
        settings = {
            "data.row_length": arguments.row_length,
            "batch.rows_per_step": arguments.rows,
            "batch.micro_batch_rows": arguments.rows,
            "train.compile": str(compiled).lower(),
            "deepspeed": f"ds_configs/zero1_{precision}.json",
            **{f"model.{name}": getattr(config, name) for name in SMALL},
            "model.dropout": config.dropout,
        }
        overrides = [f"{key}={value}" for key, value in settings.items()]
        config_path = Path(__file__).parent.parent / "configs/train/quickstart.yaml"
        steps = steps_of(config_path, Path(folder, "data"), Path(folder, "run"), arguments.steps + 3, overrides)
        return [line["step_time"] for line in steps], steps[-1]["memory"]


def matrix_rate(device: torch.device) -> str:
    """The rate of the largest product of square bf16 matrices, and of fp32 ones on a CPU."""
    size = 8192 if device.type == "cuda" else 2048
    rates = []
    for dtype in (torch.bfloat16,) if device.type == "cuda" else (torch.bfloat16, torch.float32):
        a, b = torch.randn(2, size, size, device=device, dtype=dtype)
        times = []
        for _ in range(12):
            started = time.perf_counter()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        rates.append(f"{2 * size**3 / min(times) / 1e12:.2f} TFLOP/s {str(dtype).removeprefix('torch.')}")
    return "matrix products of " + ", ".join(rates)


if __name__ == "__main__":
    main()
