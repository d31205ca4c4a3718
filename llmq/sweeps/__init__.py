"""Many models, many methods: one cell after the other, each a process of its own and a file when it is done.

`grid` says which cells there are and what each asks, `places` where they run, `table` what they come to.
"""
