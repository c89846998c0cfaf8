"""Lanes: where a request's KV cache and decode attention live. Imports nothing."""

from enum import StrEnum


class Lane(StrEnum):
    DEVICE = "device"
    HOST = "host"
