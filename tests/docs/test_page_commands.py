"""What is read out of a page: commands, files, and what people do with their hands."""

from __future__ import annotations

import subprocess

from tools.page_commands import programs, script, steps

PAGE = """# A page

```console title="bench-1"
$ mkdir here
made
$ for i in 1 2; do
>   echo $i > here/$i
> done
```

<!-- do: unplug bench-1 -->

```toml title="here/run.toml"
[run]
name = "it's"
```

```toml
[shown] # only
```
"""
NAMES = frozenset(("sketchfleet-agent", "sketchfleet-coordinator"))


def test_steps_come_in_order_with_where_they_are_done(tmp_path):
    (tmp_path / "page.md").write_text(PAGE)
    found = steps(tmp_path / "page.md")
    assert [(s.line, s.kind, s.where) for s in found] == [
        (3, "commands", "bench-1"), (11, "action", ""), (13, "file", "here/run.toml"),
        (18, "other", "toml"),
    ]  # fmt: skip
    assert found[0].commands == ["mkdir here", "for i in 1 2; do\n  echo $i > here/$i\ndone"]
    assert found[1].text == "unplug bench-1"


def test_the_script_of_a_page_does_what_it_says(tmp_path):
    (tmp_path / "page.md").write_text(PAGE)
    found = [s for s in steps(tmp_path / "page.md") if s.kind != "action"]
    done = subprocess.run(["bash", "-c", script(found)], cwd=tmp_path, check=True, text=True,
                          capture_output=True)  # fmt: skip
    assert done.stdout.splitlines()[0] == "$ mkdir here"
    assert (tmp_path / "here/2").read_text() == "2\n"
    assert (tmp_path / "here/run.toml").read_text() == '[run]\nname = "it\'s"\n'


def test_a_command_that_fails_ends_the_script(tmp_path):
    (tmp_path / "page.md").write_text("```console\n$ false\n$ touch there\n```\n")
    done = subprocess.run(["bash", "-c", script(steps(tmp_path / "page.md"))], cwd=tmp_path,
                          check=False)  # fmt: skip
    assert done.returncode and not (tmp_path / "there").exists()


def test_programs_are_found_wherever_a_shell_runs_them():
    def found(text):
        return list(programs(text, NAMES))

    assert found("sketchfleet-agent run --config a.toml > log 2>&1 &") == [
        ["sketchfleet-agent", "run", "--config", "a.toml"]
    ]
    assert found("sudo -x; OMP_NUM_THREADS=1 ./bin/sketchfleet-agent probe # measures") == [
        ["sketchfleet-agent", "probe"]
    ]
    assert found("until sketchfleet-coordinator healthcheck; do sleep 1; done") == [
        ["sketchfleet-coordinator", "healthcheck"]
    ]
    assert found("runuser -u someone -- sketchfleet-agent doctor | head") == [
        ["sketchfleet-agent", "doctor"]
    ]
    assert found('sketchfleet-agent enroll \\\n  "a word"') == [
        ["sketchfleet-agent", "enroll", "a word"]
    ]
    assert found("journalctl -u sketchfleet-agent") == []
    assert found("it's prose about sketchfleet-agent") == []
