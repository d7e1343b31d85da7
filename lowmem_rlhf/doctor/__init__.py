"""What is wrong with this machine, and the command that mends it: the command ``doctor``.

`machine` asks (each thing once, and only when a check needs it), the checks judge (`software`, `cards`, `four_bit`,
`system`), `run` puts them together. torch is loaded by a process of its own (`probe`): what crashes there is a finding.
"""
