"""The heads compared: `lockstep` trains them and `record` keeps the series of a seed.

`answers` tests what they answered, `report` collects every number, `sentence` says them in words,
`table` and `figure` show them; `session` is the whole of it.
"""
