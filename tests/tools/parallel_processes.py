"""Processes that are the ranks of a group, of whichever library."""

import os
import subprocess
import time


def run_in_parallel(command, settings, folder):
    """Runs a command once with each of these environment variables beside those that there are.

    Each writes to a log in the folder. Where one fails, all end, and what the logs say last is in the error.
    """
    processes = []
    for rank, variables in enumerate(settings):
        environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        with open(folder / f"log_{rank}", "w") as log:
            processes.append(
                subprocess.Popen([*map(str, command)], env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    started = time.monotonic()
    try:
        # Until all are through, or one is not: the others would wait for it.
        while (codes := [process.poll() for process in processes]).count(None) and not any(codes):
            assert time.monotonic() - started < 300, f"after 300 s the ranks' exit codes are {codes}"
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
    assert not any(codes), "\n".join((folder / f"log_{rank}").read_text()[-3000:] for rank in range(len(settings)))
