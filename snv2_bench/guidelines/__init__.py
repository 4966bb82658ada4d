"""The paper's measurements again: its guidelines G1 to G4 and the speeds of its Table 8.

Ma, Zhang, Zheng, Sun: *ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design*,
ECCV 2018. :mod:`~snv2_bench.guidelines.paper` holds its numbers,
:mod:`~snv2_bench.guidelines.blocks` its set-ups, :mod:`~snv2_bench.guidelines.units` the
question of G4 for ShuffleNet units, :mod:`~snv2_bench.guidelines.networks` the models of
Table 8, :mod:`~snv2_bench.guidelines.cases` what is timed beside what.
"""
