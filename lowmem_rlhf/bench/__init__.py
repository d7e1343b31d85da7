"""What a card does, measured on it: the command ``bench``, its parts, and the record that they leave.

Every part runs in processes of its own (`part`), so that one that fails, hangs or leaves the device unusable costs the
others nothing. The parts stand in `parts`; what each of them measures in `graphs`, `steps`, `planned` and
`device_tests`.
"""
