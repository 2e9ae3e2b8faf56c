"""Commands whose imports are done already: each line on stdin is one, run in a child with a process group of its own.

Answers with the child's number and, when it has ended, its exit code. Workers are forked too, so that SIGKILL to the
group ends all of a command at one moment.
"""

import json
import os
import sys
from pathlib import Path

import diffusers.models.autoencoders.autoencoder_kl_cogvideox
import sentencepiece  # noqa: F401
import transformers.models.t5.modeling_t5  # noqa: F401

import goku_mega.data.encode  # noqa: F401
from goku_mega.cli import main
from goku_mega.data import workers

assert diffusers

for line in sys.stdin:
    words, log = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        workers.START = "fork"
        errors = os.open(Path(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        code = 70
        try:
            code = main(words)
        finally:
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
