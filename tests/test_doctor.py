"""``trl-rlaif doctor``: its findings about a machine, and its advice."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from importlib.metadata import version

import huggingface_hub
import pytest
import torch
from helpers.recipes import run_cli

from trl_rlaif import doctor, hardware
from trl_rlaif.compat import trl_version
from trl_rlaif.errors import UserError
from trl_rlaif.pipeline import runner

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def found(tmp_path, monkeypatch):
    """Its findings by subject, for runs in a folder that does not exist yet."""

    def found(**changes):
        for name, value in changes.items():
            monkeypatch.setattr(doctor, name, value)
        return {finding.subject: finding for finding in doctor.examine(tmp_path / "runs" / "mine")}

    return found


def test_this_machine(found, monkeypatch, capsys, tmp_path):
    said = found()
    assert said["packages"].found.startswith("trl-rlaif ") and f"torch {version('torch')}" in said["packages"].found
    assert not said["packages"].advice and not said["plugins"].advice
    assert said["disk for runs"].found.endswith(str(tmp_path / "runs" / "mine")) and not (tmp_path / "runs").exists()
    assert said["the Hub"] == ("the Hub", "not asked: HF_HUB_OFFLINE is set", "")
    fast = hardware.computes_bfloat16("cpu")
    assert said["bfloat16"].found.startswith("computed fast" if fast else "emulated or slow")
    code, _ = run_cli(monkeypatch, capsys, "doctor", tmp_path)
    assert code == 0


def test_lines():
    findings = [doctor.Finding("a", "good"), doctor.Finding("b", "bad", "Mend it.")]
    assert [*doctor.report(iter(findings))] == [f"  {'a':<16}good", f"! {'b':<16}bad", f"{'':<18}Mend it."]


@pytest.mark.parametrize(("token", "advice"), [("hf_x", ""), (None, "`hf auth login`, for gated models.")])
def test_the_hub_is_reached(found, monkeypatch, token, advice):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, model, timeout: None)
    assert found()["the Hub"].advice == advice and found()["the Hub"].found.startswith("reached, ")


def test_the_hub_is_not_reached(found, monkeypatch):
    def refuse(self, model, timeout):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    assert found()["the Hub"][1:] == (
        "cannot be reached (ConnectionError)", "Name models and data by a path, or set HF_ENDPOINT or a proxy."
    )  # fmt: skip


def test_a_full_disk_and_one_that_is_not_ours(found, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, 3 << 30))
    disk = found()["disk for runs"]
    assert disk.found.startswith("3 GiB free") and "7B" in disk.advice
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    assert found()["disk for runs"].advice == "It cannot be written to."


def test_versions_and_plugins_that_do_not_fit(found, monkeypatch):
    def refuse():
        raise UserError("TRL 0.9 is too old.")

    monkeypatch.setattr(trl_version, "check_trl", refuse)
    monkeypatch.setattr(runner, "installed_version", lambda package: None if package == "bitsandbytes" else "1")
    said = found(find_spec=lambda name: None)
    assert said["packages"].advice == "TRL 0.9 is too old." and "bitsandbytes missing" in said["packages"].found
    assert "pip install bitsandbytes" in said["4-bit weights"].advice


def test_why_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built for processors alone" in doctor._why_no_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "ACCELERATE_USE_CPU" in doctor._why_no_gpu()
