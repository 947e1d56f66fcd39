"""The demonstration: `coordinator demo`."""

from coordinator.demo.run import run_demo

__all__ = ["run_demo"]
