"""The demo of `make demo`: starts a small cluster, streams a few prompts through it, leaves nothing running."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from pathlib import Path

from control.client import Ask, generate, waterfall
from control.launcher import Deployment
from control.up import wait_ready
from core.config import DeploymentConfig
from core.errors import RpcFailure, SetupError

MODEL = Path("deploy/demo/model")
ROOT = Path(__file__).resolve().parent.parent

NEXT = """
Next, paste these one after the other:
  .venv/bin/baton doctor --model deploy/demo/model
  .venv/bin/baton up --detach --model deploy/demo/model --prefill 2 --decode 2 --http 8000
  curl -s http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' -d '
    {"model": "model", "temperature": 0, "messages": [{"role": "user", "content": "What does textwrap.dedent do?"}]}'
  .venv/bin/baton status
  .venv/bin/baton generate --chat --waterfall "What does textwrap.dedent do?"
Then kill -9 a decode worker in mid-stream: the text pauses, and goes on at the other one (see "attempt 2" below it).
  (sleep 2; kill -9 $(pgrep -x decode-0)) & \\
  .venv/bin/baton generate --max-tokens 2000 --ignore-eos --waterfall "What does textwrap.dedent do?"
  .venv/bin/baton down
"""


def prompts() -> list[str]:
    """What the demo asks: user messages that the model was trained on, short and long."""
    asked = json.loads((ROOT / "deploy" / "demo" / "prompts.json").read_text())
    return [prompt["messages"][-1]["content"] for prompt in asked]


def run() -> None:
    """The whole demo; raises SetupError or RpcFailure."""
    config = DeploymentConfig(model=str(MODEL), prefill=2, decode=1, port=0, kv_memory="64M", profile_s=0.5)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="baton-demo-") as scratch:
        log = Path(scratch) / "baton.log"
        print("Starting a coordinator, a gateway, 2 prefill workers and 1 decode worker, each a process of its own:")
        try:
            with Deployment(config, ROOT / MODEL, "demo", log_path=log, say=lambda line: print(f"  {line}")) as cluster:
                if cluster.transport_reason:
                    print(f"  KV goes over {cluster.transport}, not UCX: {cluster.transport_reason}")
                wait_ready(cluster)
                print(f"ready after {time.monotonic() - began:.1f} s\n")
                for text in prompts():
                    _ask(cluster.gateways[0], text)
        except SetupError as error:
            words = log.read_text().splitlines()[-5:] if log.exists() else []
            raise SetupError("\n".join([str(error), *words]), exit_code=error.exit_code) from error
    print(f"All processes have ended; {time.monotonic() - began:.1f} s in all.")
    print(NEXT)


def _ask(gateway: str, text: str) -> None:
    shown = (
        text if len(text) < 300 else f"{text[:120].rstrip()} [... {len(text):,} characters ...] {text[-120:].lstrip()}"
    )
    print(f"> {shown}")
    end = None
    for response in generate(gateway, Ask(text, chat=True, options={"max_tokens": 160}).request(), timeout_s=60):
        print(response.text, end="", flush=True)
        if response.HasField("end"):
            end = response.end
    print()
    if end is not None:
        print("\n".join(waterfall(end)))
        print(
            f"  {end.prompt_tokens} prompt tokens, {end.completion_tokens} new ones, "
            f"finish reason {end.finish_reason}\n"
        )


def main() -> None:
    """Exit code 0 if all prompts were answered."""

    def interrupted(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    try:
        run()
    except KeyboardInterrupt:
        print("\ninterrupted; all processes have ended", file=sys.stderr)
        sys.exit(130)
    except SetupError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except RpcFailure as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"demo: {error.strerror}: {error.filename or ''}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
