"""Devices, processes, memory and speed."""
