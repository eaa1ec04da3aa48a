"""Run every benchmark: ``python -m benchmarks``."""

from . import attribution, patching, paths

if __name__ == "__main__":
    for module in (patching, paths, attribution):
        module.main()
