"""Cards and hosts to try before one rents them: `devices.DEVICES` and `hosts.HOSTS`, by name.

`python -m configs.hardware` prints them. To describe another one, add an entry with its source.
"""
