"""The table of peaks: what mfu is a share of."""

import pytest

from lcm_ds.devices import gpu_of

# As torch.cuda.get_device_name has them. Datasheets: NVIDIA H100 (SXM 1,979, NVL 1,671, PCIe 1,513), H200 (SXM 1,979,
# NVL 1,671), GH200 (1,979), HGX B200 and B300 (36,000 of 8 GPUs), GB200 and GB300 NVL72
# (360,000 of 72) with sparsity; A100 (312), L40S
# (362.05) and AMD MI300X (1,307.4) without. White papers, with fp32 sums: Ada (RTX 4090, 165.2), GA102 (RTX 3090, 71).
NAMES = {
    "NVIDIA GB300": 360_000 / 72 / 2,
    "NVIDIA B300 SXM6 AC": 36_000 / 8 / 2,
    "NVIDIA GB200": 360_000 / 72 / 2,
    "NVIDIA B200": 36_000 / 8 / 2,
    "NVIDIA GH200 480GB": 1979 / 2,
    "NVIDIA GH200 144G HBM3e": 1979 / 2,
    "NVIDIA H200": 1979 / 2,
    "NVIDIA H200 NVL": 1671 / 2,
    "NVIDIA H100 80GB HBM3": 1979 / 2,
    "NVIDIA H100 NVL": 1671 / 2,
    "NVIDIA H100 PCIe": 1513 / 2,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA L40S": 362.05,
    "AMD Instinct MI300X": 1307.4,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71,
}


@pytest.mark.parametrize(("name", "dense"), NAMES.items())
def test_the_peak_of_a_device_is_its_datasheets_without_sparsity(name, dense):
    assert gpu_of(name).tflops == pytest.approx(dense, rel=1e-3)


@pytest.mark.parametrize(
    "name", ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 NVL MIG 2g.24gb", "NVIDIA L40", "NVIDIA GeForce GTX 1080"]
)
def test_the_peak_of_a_part_of_a_device_and_of_an_unknown_one_is_unknown(name):
    assert gpu_of(name) is None
