"""`lcm-ds generate`: continues prompts from the command line, files or a terminal; prints texts or writes JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lcm_ds.checkpoint.model_source import find_model
from lcm_ds.errors import Collector, InputError
from lcm_ds.files import output_file_error, write_named
from lcm_ds.generate.sampler import END_OF_TEXT, MAX_CONCEPTS, REPEATS
from lcm_ds.generate.text_generator import GeneratedText, TextGenerator
from lcm_ds.terminal import strip_control_chars


def run(
    path: str,
    *,
    prompts: Sequence[str] = (),
    prompt_files: Sequence[str] = (),
    interactive: bool = False,
    max_concepts: int = 16,
    stop_end: str = "0.9",
    stop_repeat: str = "0.9",
    language: str | None = None,
    beams: int = 5,
    json_path: str | None = None,
    **loading: Any,
) -> None:
    """Continue each prompt and print the result, one line per concept.

    Args:
        path: a run or an exported folder.
        prompts: texts.
        prompt_files: files with one text each.
        interactive: also continue each line of stdin.
        max_concepts: to generate for each prompt, at most.
        stop_end: cosine to the end-of-text concept above which a text ends, or "off".
        stop_repeat: cosine to the concept before above which a text ends, or "off".
        language: of the output, an NLLB code.
        beams: of the decoder's beam search.
        json_path: a file to write the results to.
        loading: options of TextGenerator.from_pretrained.

    Raises:
        InputError: with every mistake of the call, before anything is loaded.
    """
    errors = Collector()
    texts = _read_prompts(prompts, prompt_files, errors)
    if not (prompts or prompt_files or interactive):
        errors.errors.append("generate: needs a --prompt, a --prompt-file, or --interactive")
    for name, value in (("--max-concepts", max_concepts), ("--beams", beams)):
        if value < 1:
            errors.errors.append(f"{name}: has to be at least 1, not {value}")
    settings: dict[str, Any] = {"max_concepts": max_concepts, "language": language, "beams": beams}
    for name, threshold in (("stop_end", stop_end), ("stop_repeat", stop_repeat)):
        with errors:
            settings[name] = _threshold(f"--{name.replace('_', '-')}", threshold)
    if json_path is not None:
        with errors:
            _check_json(json_path, interactive)
    with errors:
        find_model(path, loading.get("step"), needs_info=True, dataset=loading.get("dataset"))
    errors.raise_if_any()

    generator = TextGenerator.from_pretrained(path, **loading)
    generator.check_language(language)
    _print_header(generator, settings)
    results = generator.generate(texts, **settings)
    for i, result in enumerate(results, start=1):
        _print(result, generator, settings, f"prompt {i}" if len(results) > 1 else "prompt")
    if json_path is not None:
        text = json.dumps(_to_json(results, generator, settings), indent=1, ensure_ascii=False) + "\n"
        write_named("--json", json_path, text)
    for prompt in _lines() if interactive else ():
        try:
            for result in generator.generate([prompt], **settings):
                _print(result, generator, settings, "prompt")
        except InputError as error:
            print(error, file=sys.stderr, flush=True)


def _read_prompts(prompts: Sequence[str], files: Sequence[str], errors: Collector) -> list[str]:
    """The prompts of the call; each file is one."""
    named = [(f"--prompt {i}" if len(prompts) > 1 else "--prompt", text) for i, text in enumerate(prompts, start=1)]
    for file in files:
        try:
            named.append((file, Path(file).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            errors.errors.append(f"{file}: cannot be read as UTF-8 text: {error}")
    for name, text in named:
        if not text.strip():
            errors.errors.append(f"{name}: is empty; a prompt needs at least one sentence")
    return [text for _, text in named]


def _threshold(option: str, text: str) -> float | None:
    """A cosine; None for "off"."""
    if text == "off":
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not -1 <= value <= 1:
        raise InputError(f"{option}: has to be a cosine from -1 to 1, or off, not {text!r}")
    return value


def _check_json(path: str, interactive: bool) -> None:
    if interactive:
        raise InputError("--json: cannot be used with --interactive")
    if problem := output_file_error("--json", path):
        raise InputError(problem)


def _print_header(generator: TextGenerator, settings: dict[str, Any]) -> None:
    """Print which model it is, and what differs from what the user may expect."""
    source = generator.source
    print(source.path if source.step is None else f"{source.path}: step {source.step}")
    for note in generator.notes:
        print(strip_control_chars(note))
    if generator.info.end_of_text is None and settings["stop_end"] is not None:
        print(f"{source.info_path} has no end-of-text concept: --stop-end has no effect")
    sys.stdout.flush()


def _print(result: GeneratedText, generator: TextGenerator, settings: dict[str, Any], name: str) -> None:
    longest = generator.info.max_segment
    if result.left_out:
        kept, total = len(result.prompt), len(result.prompt) + result.left_out
        print(f"{name}: the last {kept} of {total} sentences (the model was trained on {longest} at a time)")
    else:
        print(f"{name}: {len(result.prompt)} sentence{'s' if len(result.prompt) > 1 else ''}")
    for sentence in result.prompt:
        print(f"      {strip_control_chars(sentence)}")
    for sentence in generator.suffix:
        print(f"      {strip_control_chars(sentence)}  (follows every prompt, as in fine-tuning)")
    before = len(result.prompt) + len(generator.suffix)
    for i, sentence in enumerate(result.sentences, start=1):
        if before + i == longest + 1:
            print(f"from here on the text is longer than the {longest} concepts that the model was trained on")
        kind = "decoded         " if result.cosines is None else f"retrieved {result.cosines[i - 1]:6.3f}"
        print(f"{i:4}  {kind} {strip_control_chars(sentence)}")
    print(f"stopped: {_reason(result.reason, settings)}", flush=True)


def _reason(reason: str, settings: dict[str, Any]) -> str:
    """Why a text ended, with the threshold that applied."""
    return {
        END_OF_TEXT: f"the last concept is the end of the text (cosine above {settings['stop_end']})",
        REPEATS: f"the last concept repeats the one before (cosine above {settings['stop_repeat']})",
        MAX_CONCEPTS: f"max_concepts was reached ({settings['max_concepts']})",
    }[reason]


def _to_json(results: Sequence[GeneratedText], generator: TextGenerator, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything but the concepts."""
    keys = ("prompt", "left_out", "sentences", "cosines", "reason")
    return {
        "model": str(generator.source.path),
        "step": generator.source.step,
        **settings,
        "source_suffix": generator.info.source_suffix,
        "texts": [{key: getattr(result, key) for key in keys} for result in results],
    }


def _lines() -> Iterator[str]:
    """Prompts that are typed or piped in, one per line, up to the end of the input; empty lines are skipped."""
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401 (gives input() editing and history)

        print("one prompt per line; Ctrl-D ends", flush=True)
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            return
        if line.strip():
            yield line
