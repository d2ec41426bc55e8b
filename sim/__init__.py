"""Workloads, scenarios, and the simulator that serves them with the real policies."""
