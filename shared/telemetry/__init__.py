"""What a process tells about itself: its metrics, their names, and where they are read.

A part asks for a family once, binds a child for each set of label values, and adds to it:

    refusals = metrics.counter("tenfold_door_refusals_total", "Guests refused.", "reason")
    full = refusals.of("full")  # once
    full.value += 1             # each time

`README.md` beside this file lists every name.
"""
