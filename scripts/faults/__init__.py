"""The faults that training must survive: each is really done to real runs.

`scripts/torture.py` does all of them in full, parity_tests/test_survival.py a few times each.
`table.TABLE` names them. A function does one: it takes how many times and a directory to work in,
and yields a Result for each time. The other modules hold the functions, by what is harmed.
"""
