"""Averages laid over a state dict."""

import torch

from lightning_diffusion.averaging import overlay


def test_overlay_keeps_what_is_not_averaged_apart():
    state = {"a": torch.zeros(0), "b": torch.zeros(0), "c": torch.ones(1)}
    assert overlay(state, {"a": torch.zeros(0)})["b"] is state["b"]
