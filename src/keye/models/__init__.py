"""The networks: one implementation for all generations of Keye-VL, driven by `keye.config`."""
