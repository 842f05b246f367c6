"""A program in C around one of the project's C files, under the sanitizers of addresses and of undefined behaviour."""

from __future__ import annotations

import subprocess
from pathlib import Path

from fasttricks_kernels import native

PRELUDE = """
#include <stdlib.h>
#include <stdio.h>
/* Each array has its own memory, so that a step beyond its end is seen. */
static float *of(int64_t n) {
    float *x = malloc(n * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = (float)(i * 7919 % 1000) / 100 - 3;
    return x;
}
int main(int argc, char **argv) {
    if (argc > 1) return ((volatile float *)of(3))[atoi(argv[1])] > 1e9f; /* a read beyond the end, to be seen */
"""
FLAGS = ("-std=gnu11", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def check_sanitized(source: Path, body: str, folder: Path, *flags: str) -> None:
    """Compile `source` with the statements `body`, which may call of(n), an array of n numbers, and run them.

    The sanitizers must find nothing in it, and a read beyond the end of an array that is planted.
    """
    text = f'#include "{source.name}"\n{PRELUDE}{body}    puts("done");\n}}\n'
    (folder / "main.c").write_text(text)
    made = folder / "main"
    command = [*native.find_compiler(), *FLAGS, *flags, f"-I{source.parent}", "-o", str(made), "main.c", "-lm"]
    subprocess.run(command, cwd=folder, check=True)
    found = [
        subprocess.run(
            [made, *more], capture_output=True, text=True, check=False, env={"ASAN_OPTIONS": "detect_leaks=0"}
        )
        for more in ([], ["5"])
    ]
    assert found[0].returncode == 0 and found[0].stdout == "done\n", found[0].stderr
    assert found[1].returncode != 0 and "heap-buffer-overflow" in found[1].stderr
