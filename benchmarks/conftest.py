"""`pytest benchmarks` runs what `gptk bench` runs: --op --case --dtype --backend --device."""

pytest_plugins = ["gptk.bench.plugin"]
