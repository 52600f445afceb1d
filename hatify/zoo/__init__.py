"""Whole model libraries, converted and proved: what there is (`catalogue`), one model (`proving`), all of them (`sweep`), and what they
convert to (`snapshots`, `page`)."""
