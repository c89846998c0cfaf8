"""Prints every device and host profile, a line each."""

from configs.hardware.devices import DEVICES
from configs.hardware.hosts import HOSTS

if __name__ == "__main__":
    for name, profile in [*DEVICES.items(), *HOSTS.items()]:
        print(f"{name:14} {profile.describe()}")  # noqa: T201
