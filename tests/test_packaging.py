"""Installations are complete: from a wheel, from the source distribution, and editable."""

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from machine import patience

from lcm_ds import __version__, resources

ROOT = Path(__file__).parent.parent
BUILD = "from setuptools import build_meta; print(build_meta.build_{kind}({folder!r}))"
NOT_SOURCES = shutil.ignore_patterns(
    ".*venv*", ".git", ".*cache", "__pycache__", "*.egg-info", "build", "site", "runs", "datasets"
)
# Imports every module except programs.
IMPORT_ALL = """
import importlib, pkgutil, sys, lcm_ds
for module in pkgutil.walk_packages(lcm_ds.__path__, "lcm_ds."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(lcm_ds.__file__)
"""


def run(*command, cwd, timeout=200, **environment):
    """(exit code, stdout, stderr), without a PYTHONPATH that points to this checkout."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=patience(timeout)
    )
    return done.returncode, done.stdout, done.stderr


def succeeds(*command, cwd, **options):
    code, out, err = run(*command, cwd=cwd, **options)
    assert code == 0, out + err
    return out


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source distribution of this checkout, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "checkout", ignore=NOT_SOURCES)
    succeeds(sys.executable, "-c", BUILD.format(kind="sdist", folder=str(folder)), cwd=folder / "checkout")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    succeeds(sys.executable, "-c", BUILD.format(kind="wheel", folder=str(folder)), cwd=unpacked)
    (wheel,) = folder.glob("*.whl")
    return unpacked, wheel


@pytest.fixture(scope="module")
def make_venv(tmp_path_factory):
    """Makes an environment in which only lcm-ds is new.

    A .pth adds the packages of the environment that runs the tests, so that nothing is downloaded; its pip then
    installs lcm-ds. The installed package comes first on the path, and the tests check its location.
    """

    def make(name, *install):
        venv = tmp_path_factory.mktemp(name)
        succeeds(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        site = venv / "lib" / version / "site-packages"
        (site / "running.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        pip = (sys.executable, "-m", "pip", "--python", venv / "bin/python", "install", "--quiet")
        succeeds(*pip, "--no-deps", "--no-build-isolation", "--ignore-installed", *install, cwd=venv)
        return venv / "bin"

    return make


@pytest.mark.slow
def test_the_source_distribution_has_what_its_tests_need(built):
    unpacked, _ = built
    listed = succeeds("git", "ls-files", cwd=ROOT).splitlines() if (ROOT / ".git").exists() else ["setup.py"]
    left_out = {name for name in listed if not (unpacked / name).exists()}
    assert left_out <= {".ci/run", ".gitattributes", ".gitignore"}


@pytest.mark.slow
def test_the_wheel_has_all_modules_and_shipped_files_and_nothing_else(built):
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        inside = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
        metadata = archive.read(f"lcm_ds-{__version__}.dist-info/METADATA").decode()
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lcm_ds").rglob("*.py")}
    shipped = {f"lcm_ds/shipped/{name}" for name in resources.names()}
    shipped |= {f"lcm_ds/text/sample_text/{name}" for name in ("README.md", "books.parquet")}
    assert {name for name in inside if ".dist-info/" not in name} == modules | shipped
    assert inside["lcm_ds/shipped/launch/slurm.sbatch"] & stat.S_IXUSR
    assert "Requires-Python: >=3.10\n" in metadata
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)} <= {
        line.removeprefix("Classifier: ") for line in metadata.splitlines()
    }


@pytest.mark.slow
def test_an_installed_wheel_works_from_an_empty_folder(built, make_venv, synthetic_dataset, tmp_path):
    lcm_ds = make_venv("wheel", built[1])
    assert succeeds(lcm_ds / "lcm-ds", "--version", cwd=tmp_path) == f"lcm-ds {__version__}\n"
    location = succeeds(lcm_ds / "python", "-c", IMPORT_ALL, cwd=tmp_path).splitlines()[-1]
    assert Path(location).is_relative_to(lcm_ds.parent)
    listed = succeeds(lcm_ds / "lcm-ds", "configs", cwd=tmp_path).splitlines()
    assert [line.split()[0] for line in listed] == list(resources.names())

    data = synthetic_dataset(embed_dim=384, documents=10)
    train = ("train", "configs/train/quickstart.yaml", f"data.train={data}", f"data.validation={data}", "--dry-run")
    assert "ZeRO 2" in succeeds(lcm_ds / "lcm-ds", *train, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []

    succeeds(lcm_ds / "lcm-ds", "configs", "launch/local.sh", cwd=tmp_path)
    local = ("launch/local.sh", *train[1:-1], "steps=2", "evaluate.every=2", "model.num_hidden_layers=1")
    local += ("optim.schedule.warmup_steps=0",)
    code, out, err = run(*local, cwd=tmp_path, PATH=f"{lcm_ds}:{os.environ['PATH']}", DEVICES="2")
    assert code == 0, out + err
    assert (tmp_path / "runs/quickstart/checkpoints/step_00000002/COMPLETE").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_wheel_installs_all_its_dependencies_into_an_empty_environment(built, tmp_path):
    """From the index, at the tested versions, isolated from the environment that runs the tests."""
    succeeds(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    lcm_ds = tmp_path / "venv/bin"
    asked = ("--constraint", ROOT / "constraints.txt", f"{built[1]}[quickstart]")
    succeeds(lcm_ds / "python", "-m", "pip", "install", "--quiet", "--no-compile", *asked, cwd=tmp_path, timeout=800)
    assert "a run can start here" in succeeds(lcm_ds / "lcm-ds", "doctor", cwd=tmp_path)
    small = ("source.take_sentences=1000", "validation=0.2", "min_sentences=2", "output=data")
    prepared = succeeds(lcm_ds / "lcm-ds", "prepare", "configs/prepare/quickstart.yaml", *small, cwd=tmp_path)
    assert re.search(r"^data: \d+ documents", prepared, re.MULTILINE)
    paths = ("data.train=data/train", "data.validation=null")
    assert "ZeRO 2" in succeeds(
        lcm_ds / "lcm-ds", "train", "configs/train/quickstart.yaml", *paths, "--dry-run", cwd=tmp_path
    )


@pytest.mark.slow
def test_an_editable_install_finds_the_checkout_s_files(make_venv, tmp_path):
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT, checkout, ignore=NOT_SOURCES)
    lcm_ds = make_venv("editable", "--editable", checkout)
    outside = tmp_path / "outside"
    outside.mkdir()
    code = "from lcm_ds import resources; print(resources.ROOT)"
    assert succeeds(lcm_ds / "python", "-c", code, cwd=outside) == f"{checkout}\n"
    (checkout / "configs/train/new.yaml").write_text("# A new one.\n")
    assert "configs/train/new.yaml" in succeeds(lcm_ds / "lcm-ds", "configs", cwd=outside)


# --- contributors' tools ----------------------------------------------------------------------------------------------


def test_pre_commit_runs_the_programs_of_make_check():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (local,) = config["repos"]
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    checked = {tuple(line.split()[:2]) for line in recipe.replace("$(BIN)", ".venv/bin").splitlines()}
    assert {tuple(hook["entry"].split()[:2]) for hook in local["hooks"]} == checked
    assert all(hook["language"] == "system" for hook in local["hooks"])  # pre-commit downloads nothing


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_templates_and_workflow_are_yaml_and_name_existing_targets_and_files(path):
    text = path.read_text()
    assert isinstance(yaml.safe_load(text), dict)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"run: make ([a-z-]+)", text)) <= set(targets)
    assert all((ROOT / name).exists() for name in re.findall(r"\btests/[\w/]+(?:\.py)?", text))


def test_setup_names_every_package_that_is_imported():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "lcm_ds").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names - {"lcm_ds"}
    distributions = {"yaml": "pyyaml", "mlflow": "mlflow-skinny"}
    setup = (ROOT / "setup.py").read_text(encoding="utf-8").lower().replace("_", "-")
    for package in packages:
        assert f'"{distributions.get(package, package).replace("_", "-")}' in setup, package
