"""Described hardware: every profile says where it is from, and follows by hand to seconds."""

import dataclasses
import re
import subprocess
import sys

import pytest

from apex_jax.config import ConfigError
from apex_jax.hardware_profiles import GIB, stage_times
from configs import llama_2_7b, llama_3_1_8b
from configs.hardware.devices import DEVICES
from configs.hardware.hosts import HOSTS

PROFILES = {**DEVICES, **HOSTS}
LLAMA_2_7B = llama_2_7b.get_config().model.architecture
LLAMA_3_1_8B = llama_3_1_8b.get_config().model.architecture


def test_there_are_the_cards_and_hosts_that_people_ask_about():
    assert {"t4", "a10", "l4", "rtx_4090", "a100_40gb", "a100_80gb", "h100", "h200"} <= set(DEVICES)
    assert {"epyc_1_thread", "paper_t4", "paper_a10", "g4dn_4xlarge"} <= set(HOSTS)
    assert {name for name in HOSTS if name.startswith("g5_")} == {
        f"g5_{size}xlarge" for size in (2, 4, 8, 16)
    }


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_has_a_source_and_shares_of_what_that_says(name):
    profile = PROFILES[name]
    assert re.search(r"https://\S+\.\w|arXiv \d{4}\.\d{5}|docs/results/\S+\.json", profile.source)
    assert profile.source in profile.describe()
    shares = {key: value for key, value in vars(profile).items() if key.endswith("_share")}
    assert shares
    assert all(0.4 <= share <= 1 for share in shares.values()), shares
    assert 10 * GIB < profile.memory_bytes < 300 * GIB
    assert 10e9 < profile.bytes_per_sec < 5e12


def test_a_newer_card_of_a_line_is_no_slower_than_the_older_one():
    for older, newer in (("t4", "a10"), ("a100_40gb", "a100_80gb"), ("a100_80gb", "h200")):
        for rate in ("memory_bytes", "bytes_per_sec", "flops_per_sec", "link_bytes_per_sec"):
            assert getattr(DEVICES[older], rate) <= getattr(DEVICES[newer], rate)


def test_bandwidths_of_sockets_are_those_of_their_channels():
    assert HOSTS["paper_t4"].bytes_per_sec == pytest.approx(2 * 128e9, rel=1e-3)
    assert HOSTS["paper_a10"].bytes_per_sec == pytest.approx(2 * 204.8e9)
    assert HOSTS["g5_16xlarge"].bytes_per_sec == pytest.approx(204.8e9 * 32 / 48)


def test_the_times_of_a_7b_model_on_a_t4_are_those_worked_out_by_hand():
    times = stage_times(LLAMA_2_7B, 2, DEVICES["t4"], HOSTS["paper_t4"])
    reached = 0.72 * 320e9
    layer_weights = 4 * 4096 * 4096 + 3 * 4096 * 11008
    assert times.num_layers == 32
    assert times.linear_sec == pytest.approx(2 * layer_weights / reached)
    assert times.linear_sec == pytest.approx(1.757e-3, rel=1e-3)
    assert times.linear_sec_per_row == pytest.approx(2 * layer_weights / 32.5e12)
    assert times.pre_share == pytest.approx(3 * 4096 * 4096 / layer_weights)
    assert times.head_sec == pytest.approx(2 * 32000 * 4096 / reached)
    token_bytes = 2 * 4096 * 2
    attention_sec = 3e-6 + 2400 * token_bytes / reached
    assert times.device_attention(6, 2400) == pytest.approx(attention_sec)
    host_rate = 0.81 * 12 * 8 * 2666e6
    assert times.host_attention(6, 2400) == pytest.approx(60e-6 + 2400 * token_bytes / host_rate)
    row_bytes = 3 * 4096 * 2
    assert times.transfer(num_rows=10) == pytest.approx(20e-6 + 10 * row_bytes / 12e9)
    assert times.transfer(num_tokens=16) == pytest.approx(20e-6 + 16 * token_bytes / 12e9)


def test_attention_has_a_rate_of_its_own():
    a10 = DEVICES["a10"]
    gathered = dataclasses.replace(a10, attention_share=a10.attention_share / 3)
    times, slower = (
        stage_times(LLAMA_3_1_8B, 2, card, HOSTS["paper_a10"]) for card in (a10, gathered)
    )
    attention_sec = times.device_attention(2, 100) - times.stage_sec
    assert slower.device_attention(2, 100) == pytest.approx(times.stage_sec + 3 * attention_sec)
    assert slower.linear(10) == times.linear(10)


def test_what_is_left_for_kv_cache_is_what_weights_and_reserve_do_not_take():
    kv_bytes = DEVICES["t4"].kv_bytes(LLAMA_2_7B, 2, reserve_bytes=2 * GIB)
    assert kv_bytes == 15 * GIB - 2 * 6_738_415_616 - 2 * GIB
    # A T4 holds few: 500 to 2,500 tokens in all, of 512 KiB each.
    assert 500 < kv_bytes // LLAMA_2_7B.kv_bytes_per_token(2) < 2500


def test_a_card_that_cannot_hold_the_model_says_so():
    message = r"NVIDIA T4 has 15.00 GiB .* cannot hold 14.96 GiB of weights and 1.00 GiB in reserve"
    with pytest.raises(ConfigError, match=message):
        DEVICES["t4"].kv_bytes(LLAMA_3_1_8B, 2, reserve_bytes=GIB)


def test_they_are_printed_by_name_without_jax():
    code = (
        "import runpy, sys; runpy.run_module('configs.hardware', run_name='__main__');"
        "sys.exit('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(PROFILES)
    assert all(PROFILES[line.split()[0]].name in line for line in lines)
