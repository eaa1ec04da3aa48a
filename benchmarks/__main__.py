"""Run every benchmark: ``python -m benchmarks``."""

from . import patching

if __name__ == "__main__":
    patching.main()
