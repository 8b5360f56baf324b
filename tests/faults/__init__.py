"""Attacks on the command line as code: nothing is lost, nothing is silently wrong, no code in data runs.

    test_kills.py       (order x residency x kill -9)
    test_signals.py     (phase x signal), and compare with its children
    test_damage.py      (command x file x damage), what does not belong in a run folder, every bit of state.json
    test_disks.py       (place x full or read-only disk)
    test_pairs.py       two processes on one folder
    test_inputs.py      wrong options, values, recipes and data
    test_code.py        planted code
    test_properties.py  what hypothesis makes up: options, YAML, JSON, JSONL, state files
    harness.py          commands in this process and in others, and the laws that every command obeys
    server.py           forks commands from a process that has imported everything
    result.py           benchmarks/results/faults.json and docs/errors.md, from a full run

The suite runs a few cases of each, always the same; `make faults` runs all of them.
"""
