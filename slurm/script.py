"""The batch script of a request: pure, from checked values to text.

What decides is `BatchRequest.hook` (tested without a shell); the script itself starts the step,
passes signals on and asks for a requeue, because Slurm's commands are missing inside of many
containers. Every value in it was matched with its allow-pattern (`config.PATTERNS`) and is
quoted besides.
"""

from __future__ import annotations

import shlex

from motet.core.jobs import JobExit
from motet.slurm.config import BatchRequest, JobComponent

HETJOB = "#SBATCH hetjob"
ALWAYS_PASSED = ("HOME", "LANG", "LOGNAME", "PATH", "SHELL", "USER")
"""Variables of the user's shell that every job gets, by name: their values go with Slurm's own
record of the job.
"""
REQUEUE_WAIT_S, HOLD_S = 300, 900
ALONE_S = 40
"""A job that Slurm is ending is over in KillWait (30 s unless a site says otherwise). One that is
there after it was not ended: only its batch step was told to.
"""

_BODY = """\
# Made by `motet submit`. What it starts is the copy of the code in the run's folder.
unset SLURM_EXPORT_ENV # else srun would pass on no more than what the job was given
{setup}

step= asked=
stop() { # repeated: srun drops a signal that comes while it starts its tasks
    asked=$1
    if [[ -n $step ]]; then
        while kill -USR1 "$step" 2>/dev/null; do sleep 2; done &
    fi
}
trap 'stop time' USR1   # the time limit is near
trap 'stop killed' TERM INT HUP USR2 # Slurm is ending this job, or somebody this script alone

MOTET_ATTEMPT=$("${helper[@]}" begin "$run") || exit 1
[[ -n $MOTET_ATTEMPT ]] || exit 0
export MOTET_ATTEMPT
{srun} &
step=$!
[[ -z $asked ]] || stop "$asked"
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # a signal ended the wait, not the step
    wait "$step"
    code=$?
done

"${helper[@]}" end "$run" "$code" "$asked"
case $? in
0) exit 0 ;;
{requeue})
    if scontrol requeue "$job"; then
        sleep {requeue_wait} # Slurm ends this script meanwhile
        exit 0
    fi
    echo "motet: the job could not requeue itself; to go on: motet resume $run" >&2
    ;;
{hold})
    {alone}
    ;;
esac
exit 1
"""

_WAIT = "sleep {alone_s} # Slurm ends this script meanwhile, if it is ending the job"
_ALONE = {
    "self": f"""{_WAIT}
    echo "motet: only this script was told to end: the job is requeued" >&2
    if scontrol requeue "$job"; then
        sleep {{requeue_wait}}
        exit 0
    fi
    echo "motet: the job could not requeue itself; to go on: motet resume $run" >&2""",
    "site": "sleep {hold_s} # Slurm requeues this job, or ends it",
    "never": f"""{_WAIT}
    echo "motet: only this script was told to end; to go on: motet resume $run" >&2""",
}
"""What a job does that was told to end, by `slurm.requeue`."""


def batch_script(request: BatchRequest) -> str:
    """Return the whole text that sbatch gets."""
    common = _common_options(request)
    lines = ["#!/bin/bash -l" if request.modules else "#!/bin/bash"]
    for number, group in enumerate(request.groups):
        own = _job_options(request) if number == 0 else []
        lines += [HETJOB] if number else []
        lines += [f"#SBATCH {option}" for option in (*common, *own, *_group_options(group))]
    body = _BODY
    for name, text in {
        "setup": "\n".join(_setup(request)),
        "srun": _srun(request),
        "requeue": str(JobExit.REQUEUE.value),
        "hold": str(JobExit.HOLD.value),
        "alone": _ALONE[request.requeue],
        "alone_s": str(ALONE_S),
        "requeue_wait": str(REQUEUE_WAIT_S),
        "hold_s": str(HOLD_S),
    }.items():
        body = body.replace(f"{{{name}}}", text)
    return "\n".join([*lines, "", body])


def _common_options(request: BatchRequest) -> list[str]:
    """Options that every component repeats: Slurm passes few of them on."""
    out = [f"--job-name={request.name}"]
    for name in ("account", "qos", "time"):
        value = getattr(request, name)
        out += [f"--{name}={value}"] if value else []
    out.append("--no-requeue" if request.requeue == "never" else "--requeue")
    out.append(f"--export={','.join(sorted({*ALWAYS_PASSED, *request.passed}))}")
    output = f"{request.run}{'%a' if request.array else ''}/slurm/{_output(request)}"
    out.append(f'--output="{output}"' if " " in output else f"--output={output}")
    return [*out, "--open-mode=append"]


def _output(request: BatchRequest) -> str:
    return "output-%A_%a.txt" if request.array else "output-%j.txt"


def _job_options(request: BatchRequest) -> list[str]:
    """Options of the job as a whole: its first component has them."""
    out = [f"--signal=B:USR1@{request.signal_s}"] if request.signal_s else []
    if request.array:
        limit = f"%{request.array_limit}" if request.array_limit else ""
        out.append(f"--array={','.join(map(str, request.array))}{limit}")
    out += [f"--dependency={','.join(request.dependency)}"] if request.dependency else []
    out += [f"--mail-user={request.mail_user}"] if request.mail_user else []
    return out + ([f"--mail-type={','.join(request.mail_type)}"] if request.mail_type else [])


def _group_options(group: JobComponent) -> list[str]:
    out = [f"--partition={group.partition}"] if group.partition else []
    out += [f"--nodes={group.nodes}", "--ntasks-per-node=1", f"--cpus-per-task={group.cpus}"]
    if group.gpus:
        kind = f"{group.gpu_type}:" if group.gpu_type else ""
        out.append(f"--gres=gpu:{kind}{group.gpus}")
    out += [f"--mem={group.memory}"] if group.memory else []
    out += [f"--constraint={group.constraint}"] if group.constraint else []
    out += [f"--reservation={group.reservation}"] if group.reservation else []
    return out + (["--exclusive"] if group.exclusive else [])


def _setup(request: BatchRequest) -> list[str]:
    """Lines that name the run, set the environment and say how python is started."""
    run = shlex.quote(request.run)
    job = "$SLURM_JOB_ID"
    if request.array:
        run += '"$SLURM_ARRAY_TASK_ID"'
        job = '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"'
    lines = [f"run={run}", f"job={job}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in request.variables]
    lines += [f"module load {shlex.join(request.modules)}"] if request.modules else []
    lines.append('export PYTHONPATH="$run/code${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1')
    lines.append(f"python=({shlex.join([*request.container, request.python])})")
    # Where srun enters the container, the helper must start inside as well.
    inside = [word for word in request.srun if word.startswith("--container")]
    start = f"srun --nodes=1 --ntasks=1 {shlex.join(inside)} " if inside else ""
    return [*lines, f'helper=({start}"${{python[@]}}" -m {request.hook})']


def _srun(request: BatchRequest) -> str:
    """One step over all groups: one task per node, numbered by group and node."""
    words = ["srun --kill-on-bad-exit=1 --export=ALL"]
    for number, group in enumerate(request.groups):
        if number:
            words.append(":")
        words += [f"--het-group={number}"] if len(request.groups) > 1 else []
        words.append(f"--nodes={group.nodes} --ntasks={group.nodes} --cpus-per-task={group.cpus}")
        words += [shlex.join(request.srun)] if request.srun else []
        words.append(f'"${{python[@]}}" -m {request.node} "$run"')
    return " ".join(words)
