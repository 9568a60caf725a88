"""What a command line does around a Trainer; nothing heavy is imported before it is needed.

Read `command`, then `arguments`, `folder` and `start`; `checkpoint`, `signals`, `processes` and
`terminal` are what these use.
"""
