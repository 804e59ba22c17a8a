"""The Kubernetes manifest and the Dockerfile: what can be checked without a cluster or registry."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import yaml

from megatron_moe.config.cli import parse_args
from megatron_moe.config.presets import PRESETS
from megatron_moe.config.validate import validate
from megatron_moe.platform.release import NEW
from megatron_moe.training.phases import resolve_run_schedule

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "examples" / "Dockerfile").read_text()


def test_the_manifest_starts_a_run_that_the_resolver_accepts() -> None:
    job = yaml.safe_load((ROOT / "examples" / "kubernetes" / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    pods = [spec["template"]["spec"] for spec in replicas.values()]
    assert pods[0] == pods[1]
    (container,) = pods[0]["containers"]
    assert container["name"] == "pytorch", "the operator sets its variables there"
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert job["spec"]["nprocPerNode"] == str(gpus)
    script, name, *flags = container["args"]
    assert name == "pretrain"
    config = parse_args(flags).config
    validate(config)
    assert config.model == PRESETS["openmoe-8b-32e-released"].model
    ranks = gpus * sum(spec["replicas"] for spec in replicas.values())
    schedule = resolve_run_schedule(config, ranks)
    assert (schedule.phases[0].layout.dp, schedule.phases[0].layout.ep) == (64, 8)
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pods[0]["volumes"]}
    # bash reads the script as the pod does, up to torchrun.
    echo = script.replace("exec python", "printf '%s\\n'")
    done = subprocess.run(
        ["bash", "-euc", echo, name, *flags], cwd=ROOT, capture_output=True, text=True, check=True
    )
    words = done.stdout.splitlines()
    assert words[0] == "tools/torchrun.py"
    assert words[words.index("pretrain_openmoe.py") + 1 :] == flags


def test_the_image_has_the_versions_of_this_project() -> None:
    setup = (ROOT / "setup.py").read_text()
    pinned = re.search(r'"gpu": \["(transformer-engine\[[^"]*)"', setup)
    assert pinned is not None and f'"{pinned[1]}"' in DOCKERFILE
    pin = f"""'megatron-core=={NEW}; python_version >= "3.12"'"""
    assert pin in setup, "installed by the project itself"
    assert re.search(r'"torch>=2\.13,<2\.14"', setup) and '"torch==2.13.*"' in DOCKERFILE
    assert re.search(r"^ARG APEX_COMMIT=[0-9a-f]{40}$", DOCKERFILE, re.MULTILINE)
    installs = [line for line in DOCKERFILE.splitlines() if "pip install" in line]
    assert not any(re.search(r"\sapex([\s=]|$)", line) for line in installs), "another package"
    assert "ubuntu24.04" in DOCKERFILE, "whose Python is 3.12"
