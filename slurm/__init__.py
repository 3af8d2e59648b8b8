"""The first scheduler: batch scripts as text (pure), the only calls of Slurm's commands, hosts.

Others use `client.Client`, `config` (what a job asks for), `script.batch_script`, `job` (where a
process of a job stands), `inventory` (nodes of a site) and `testbed`. Nothing here imports torch.
"""
