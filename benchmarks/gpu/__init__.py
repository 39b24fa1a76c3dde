"""What a machine with a GPU is asked once: `python3 -m benchmarks.gpu --out DIR --minutes 9`.

Ordered stages, the most important first, each in processes of their own with a time limit, below
one deadline for all. Every stage writes JSON as it goes and the report is made again after each,
so a run that is cut short leaves what it had found. Needs Python, torch, triton, numpy and pytest.
"""
