"""What engines are made of: meshes of ranks, and each way to split a decoder over them.

Engines use `mesh.build_meshes`, `shard.split`, `pipeline`, `context_parallel`, `dtensors` and
`step_totals`; ranks and guests use `mesh.World` and its agreements (`agree_any`, `tell_all`).
"""
