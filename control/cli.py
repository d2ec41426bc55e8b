"""The `baton` command. Verbs load what they need and nothing before (`baton --help` loads neither torch nor grpc).

Exit codes: 0 done; 1 the operation failed; 2 wrong usage or settings; 3 nothing is running or nobody answers;
4 an address is taken; 5 the model cannot be served; 6 refused at join; 7 the transport cannot be used; 8 a process
did not start; 70 a fault of our own; 130 interrupted. Data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.errors import RpcFailure, SetupError


class Verb(argparse.ArgumentParser):
    """A verb's flags; its last paragraph is made only when somebody asks for help."""

    last: Callable[[], str] | None = None

    def format_help(self) -> str:
        """The help, last paragraph included."""
        if self.last is not None:
            self.epilog = self.last()
        return super().format_help()


def parser() -> argparse.ArgumentParser:
    """All verbs and their flags."""
    top = argparse.ArgumentParser(prog="baton", description="Disaggregated prefill/decode serving of language models.")
    top.add_argument(
        "--state",
        metavar="DIR",
        help="where a local deployment leaves word of itself (default: $BATON_STATE or the user's state directory)",
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Verb)

    up = verbs.add_parser("up", help="start a deployment on this machine")
    up.add_argument("--config", metavar="FILE", help="TOML file with the same names as the flags; flags win")
    up.add_argument("--detach", action="store_true", help="return when ready and leave it running")
    _settings(up)

    generate = verbs.add_parser("generate", help="stream the text of one prompt")
    generate.add_argument("prompt", nargs="?", help="the prompt; standard input if missing")
    generate.add_argument("--chat", action="store_true", help="send it as a user's chat message")
    generate.add_argument("--gateway", metavar="HOST:PORT", help="default: the local deployment's first")
    generate.add_argument("--model", default="", help="served name")
    generate.add_argument("--max-tokens", type=int)
    generate.add_argument("--temperature", type=float)
    generate.add_argument("--top-k", type=int)
    generate.add_argument("--top-p", type=float)
    generate.add_argument("--seed", type=int)
    generate.add_argument("--stop", action="append", default=[], help="stop string; may be repeated")
    generate.add_argument("--ignore-eos", action="store_true")
    matches = generate.add_mutually_exclusive_group()
    matches.add_argument("--json-schema", metavar="FILE", help="the text must be JSON that fits this schema")
    matches.add_argument("--regex", metavar="REGEX", help="the whole text must match this regular expression")
    matches.add_argument("--grammar", metavar="FILE", help="the text must match this grammar (Lark's notation or GBNF)")
    generate.add_argument("--request-id", default="")
    generate.add_argument("--group", default="", metavar="NAME", help="whose workers are to serve it")
    generate.add_argument("--timeout", type=float, metavar="SECONDS")
    generate.add_argument("--waterfall", action="store_true", help="show where the time went")

    verbs.add_parser("status", help="who is there, ready or not, over which lanes")
    get = verbs.add_parser(
        "get", help="requests: who has each that is in flight, and what it waits for; workers: group, role, lanes"
    )
    get.add_argument("what", choices=("requests", "workers"))
    get.add_argument(
        "--older", type=_duration, default=0.0, metavar="TIME", help="of at least this age: 10s, 500ms, 2m"
    )
    trace = verbs.add_parser("trace", help="where the time of a running or finished request went")
    trace.add_argument("request", metavar="ID", help="the client's name for it, or the one it was given")
    debug = verbs.add_parser("debug", help="tasks, stacks, policy state and page table of a running process")
    debug.add_argument("process", metavar="NAME", help="such as decode-0, gateway-0, coordinator")
    replay = verbs.add_parser(
        "replay", help="give the machines of a recording the same events; do they decide the same?"
    )
    replay.add_argument("recording", nargs="+", metavar="FILE|DIR", help="what `baton up --record DIR` wrote")
    verbs.add_parser("down", help="end the local deployment")
    doctor = verbs.add_parser("doctor", help="what this machine can do, and what is missing")
    doctor.add_argument("--model", help="say how much fits for this model directory or hub id")
    doctor.add_argument("--kv-memory", default="256M", help="KV cache of a worker (default %(default)s)")
    doctor.add_argument("--port", type=int, default=50051, help="gateway port to look at (default %(default)s)")
    _simulation(verbs.add_parser("simulate", help="what a deployment would do with a workload, without one"))
    _planning(verbs.add_parser("plan", help="how many devices a workload needs, in which pools, and why"))
    for verb in verbs.choices.values():
        verb.add_argument("-o", "--output", choices=("table", "json"), default="table")
    return top


def main(argv: list[str] | None = None) -> None:
    """Run one verb and exit."""
    words = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(words)
    try:
        code = _run(args, words)
    except (SetupError, RpcFailure) as error:
        print(f"baton: {error}", file=sys.stderr)
        code = error.exit_code if isinstance(error, SetupError) else 1
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        sys.stderr.close()
        code = 1
    sys.exit(code)


def _run(args: argparse.Namespace, words: list[str]) -> int:
    from control import state

    where = state.directory(args.state)
    as_json = args.output == "json"
    match args.verb:
        case "up":
            from control.up import up

            return up(_deployment(args), where, as_json=as_json, detach=args.detach, argv=words)
        case "down":
            from control.up import down

            return down(where)
        case "generate":
            return _generate(args, args.gateway or state.read(where).gateways[0], as_json=as_json)
        case "status":
            from control.status import status

            return status(state.read(where), as_json=as_json)
        case "get":
            if args.what == "workers":
                from control.status import get_workers

                return get_workers(state.read(where), as_json=as_json)
            from control.requests import get_requests

            return get_requests(state.read(where), older_s=args.older, as_json=as_json)
        case "trace":
            from control.requests import trace

            return trace(state.read(where), args.request, as_json=as_json)
        case "debug":
            from control.requests import debug

            return debug(state.read(where), args.process, as_json=as_json)
        case "replay":
            from control.replay import replay

            return replay(args.recording, as_json=as_json)
        case "simulate":
            if args.recording:
                from control.predict import run as predict

                return predict(args, parser().parse_args(["simulate"]), as_json=as_json)
            from control.simulate import run

            return run(args, as_json=as_json)
        case "plan":
            from control.plan import run as plan

            return plan(args, as_json=as_json)
        case _:
            from control.doctor import doctor

            return doctor(args.model, args.kv_memory, args.port, where, as_json=as_json)


def _settings(up: argparse.ArgumentParser) -> None:
    """One flag for each field of DeploymentConfig."""
    from dataclasses import MISSING, fields

    from core.config import DeploymentConfig, documented

    texts = documented(DeploymentConfig)
    for field in fields(DeploymentConfig):
        flag = f"--{field.name.replace('_', '-')}"
        default = "" if field.default in (MISSING, "") else f" (default {field.default})"
        text = (texts[field.name] + default).replace("%", "%%")
        if field.type == "bool":
            up.add_argument(
                flag, dest=field.name, action=argparse.BooleanOptionalAction, default=None, help=texts[field.name]
            )
        elif field.type == "tuple[Group, ...]":
            up.add_argument(
                flag, dest=field.name, type=_group, action="append", help=texts[field.name], metavar="NAME: WORKERS"
            )
        else:
            kind = {"int": int, "float": float, "str": str}[str(field.type)]
            up.add_argument(flag, dest=field.name, type=kind, default=None, help=text, metavar=kind.__name__.upper())


def _simulation(simulate: Verb) -> None:
    """Flags of `baton simulate` (docs/simulator.md)."""
    simulate.formatter_class = argparse.RawDescriptionHelpFormatter
    simulate.last = _policies
    add = simulate.add_argument
    what = (
        "a shipped generator, a file, or a file's name among the public traces (docs/workloads.md; default %(default)s)"
    )
    add("--trace", default="azure-conv", metavar="NAME|FILE", help=what)
    add("--workers", default="2 prefill, 2 decode", metavar="SPEC", help='such as "4 prefill tp2, 4 decode tp1"')
    add(
        "--cost",
        default="h200-llama-3.1-8b",
        metavar="NAME",
        help="DEVICE-MODEL of the cost model (default %(default)s)",
    )
    add("--policy", default="baton", metavar="NAME|FILE.py", help="one of those below, or a file with a POLICY")
    add("--compare", metavar="NAME,...", help="others beside it; all: every one below")
    add("--slo", default="ttft=0.4,gap=0.05", metavar="GOALS", help="seconds; empty for none (default %(default)s)")
    add("--rate", type=_more_than_0, metavar="R", help="requests (or sessions) a second; default: as recorded")
    add("--cv", type=_at_least_0, metavar="X", help="variation of the gaps between arrivals, drawn anew; 1: Poisson")
    add("--requests", type=_count, metavar="N", help="how many; default: all of a file, 2000 of a generator")
    add("--window", metavar="START:STOP", help="this part of a file with times, in seconds")
    add("--jitter", type=_more_than_0, metavar="S", help="spread stamps that are rounded to S seconds (Mooncake: 3)")
    add("--think", type=_at_least_0, metavar="S", help="rows of a length file are turns of sessions with this pause")
    add("--agent", metavar="NAME", help="one kind of a file of agents")
    add("--scenario", metavar="NAME|FILE.toml", help="what goes wrong and what changes")
    add("--seed", type=int, default=1, metavar="N", help="the first seed (default %(default)s)")
    add("--seeds", type=_count, default=1, metavar="N", help="how many (default %(default)s)")
    add(
        "--max-tokens", type=_count, metavar="N", help="what clients ask for at most; default: what the answer comes to"
    )
    add("--page-tokens", type=_count, default=16, metavar="N", help="tokens in a page of KV (default %(default)s)")
    add(
        "--kv-tokens",
        type=_count,
        metavar="N",
        help="tokens of KV a worker holds; default: what fits beside the weights",
    )
    add("--lane", default="rdma-400g", metavar="NAME", help="how KV moves (default %(default)s)")
    add("--gateways", type=_count, default=1, metavar="N", help="how many (default %(default)s)")
    add(
        "--ratio",
        choices=("static", "adaptive"),
        default="static",
        help="adaptive: workers change between prefill and decode as traffic does (default %(default)s)",
    )
    add("--plan", metavar="FILE", help="as `baton plan -o json` writes it: workers may be added and removed within it")
    add("--rates", metavar="R,...", help="attainment at each of these rates")
    add("--goodput", action="store_true", help="search the highest rate that is sustained, from --rate on")
    add("--share", type=_more_than_0, default=0.9, metavar="X", help="that must be good for it (default %(default)s)")
    add(
        "--warm",
        type=_at_least_0,
        default=0.0,
        metavar="S",
        help="of it and of --rates: who comes this early is not judged",
    )
    add("--cool", type=_at_least_0, default=0.0, metavar="S", help="nor who comes this shortly before the last")
    add(
        "--recording",
        metavar="DIR",
        help="the deployment that `baton up --record DIR` wrote of: percentiles as measured in it, and as predicted",
    )
    add("--out", metavar="DIR", help="write report.html, summary.json, requests.csv and timeline.csv there")


def _planning(plan: Verb) -> None:
    """Flags of `baton plan` (docs/planner.md)."""
    add = plan.add_argument
    add("--model", required=True, metavar="NAME|DIR", help="a known model, or a directory with a config.json")
    add("--gpus", type=_count, required=True, metavar="N", help="devices that there are")
    add("--gpu", default="h200", metavar="NAME", help="what they are: a100, h100, h200 (default %(default)s)")
    add("--per-node", type=_count, default=8, metavar="N", help="in a node (default %(default)s)")
    add("--rate", type=_more_than_0, required=True, metavar="R", help="requests (or sessions) a second to sustain")
    add("--slo", default="ttft=0.4,gap=0.05", metavar="GOALS", help="seconds; empty for none (default %(default)s)")
    add("--share", type=_more_than_0, default=0.9, metavar="X", help="of requests that are good (default %(default)s)")
    what = "a shipped generator, a file, or a file's name among the public traces (default %(default)s)"
    add("--trace", "--workload", default="azure-conv", metavar="NAME|FILE", help=what)
    add("--cv", type=_at_least_0, metavar="X", help="variation of the gaps between arrivals, drawn anew; 1: Poisson")
    add("--window", metavar="START:STOP", help="this part of a file with times, in seconds")
    add("--jitter", type=_more_than_0, metavar="S", help="spread stamps that are rounded to S seconds")
    add("--think", type=_at_least_0, metavar="S", help="rows of a length file are turns of sessions with this pause")
    add("--agent", metavar="NAME", help="one kind of a file of agents")
    add("--gpu-hour", type=_more_than_0, metavar="X", help="what an hour of one device costs: adds money a token")
    add("--off", type=_more_than_0, default=0.2, metavar="X", help="by how much rate, lengths, goals may be off")
    add("--segments", action=argparse.BooleanOptionalAction, default=True, help="phases that share nodes, too")
    add("--requests", type=_count, metavar="N", help="of each simulation (default: 800 to 6000, as the rate wants)")
    add("--stages", type=_count, metavar="N", help="no pipeline is longer (default: any that divides the layers)")
    add("--lane", default="rdma-400g", metavar="NAME", help="how KV moves between nodes (default %(default)s)")
    add("--policy", default="baton", metavar="NAME", help="of prefill and decode workers (default %(default)s)")
    add("--mixed-policy", default="colocated-chunked", metavar="NAME", help="of mixed ones (default %(default)s)")
    add("--page-tokens", type=_count, default=64, metavar="N", help="tokens in a page of KV (default %(default)s)")
    add("--seed", type=int, default=1, metavar="N", help="of the workload (default %(default)s)")
    add("--jobs", type=_count, metavar="N", help="evaluations side by side (default: as many as cores)")


def _policies() -> str:
    from control.simulate import about

    return about()


def _group(text: str) -> Any:
    from core.group import Group

    try:
        return Group.parse(text)
    except SetupError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _duration(text: str) -> float:
    """Seconds; a bare number is one of seconds."""
    number = text.rstrip("hms")
    units = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
    unit = units.get(text[len(number) :])
    try:
        value = float(number) * (unit if unit is not None else -1.0)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, want a time such as 10s, 500ms, 2m")
    return value


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"got {text!r}, want an integer of at least 1")
    return int(text)


def _at_least_0(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, want a finite number of at least 0")
    return value


def _more_than_0(text: str) -> float:
    if not (value := _at_least_0(text)):
        raise argparse.ArgumentTypeError(f"got {text!r}, want a finite number above 0")
    return value


def _deployment(args: argparse.Namespace) -> Any:
    """The settings: defaults, then the TOML file, then flags."""
    import tomllib
    from dataclasses import fields

    from core.config import DeploymentConfig, build

    values: dict[str, Any] = {}
    where = "flags"
    if args.config:
        where = args.config
        try:
            values = tomllib.loads(Path(args.config).read_text())
        except OSError as error:
            raise SetupError(f"{args.config}: {error.strerror}") from error
        except tomllib.TOMLDecodeError as error:
            raise SetupError(f"{args.config}: not TOML: {error}") from error
    for field in fields(DeploymentConfig):
        given = getattr(args, field.name)
        if given is not None:
            values[field.name] = given
    return build(DeploymentConfig, values, where)


def _text(file: str | None) -> str | None:
    """What stands in a file, if there is to be one."""
    try:
        return None if file is None else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{file}: cannot be read: {error}") from error


def _generate(args: argparse.Namespace, gateway: str, *, as_json: bool) -> int:
    from control.client import Ask, generate, waterfall

    text = args.prompt if args.prompt is not None else sys.stdin.read()
    names = ("model", "max_tokens", "temperature", "top_k", "top_p", "seed", "stop", "ignore_eos")
    options = {name: getattr(args, name) for name in names}
    options |= {"json_schema": _text(args.json_schema), "regex": args.regex, "grammar": _text(args.grammar)}
    ask = Ask(text, args.chat, args.request_id, options, args.group)
    try:
        request = ask.request()
    except (ValueError, TypeError) as error:
        raise SetupError(f"a sampling flag is out of its range: {error}") from error
    tokens: list[int] = []
    words: list[str] = []
    end = None
    for response in generate(gateway, request, args.timeout):
        tokens.extend(response.token_ids)
        words.append(response.text)
        if not as_json:
            print(response.text, end="", flush=True)
        if response.HasField("end"):
            end = response.end
    if end is None:
        raise RpcFailure("the stream ended without its last message")
    if as_json:
        from google.protobuf.json_format import MessageToDict

        document = {
            "text": "".join(words),
            "token_ids": tokens,
            "end": MessageToDict(end, preserving_proto_field_name=True),
        }
        print(json.dumps(document))
        return 0
    print()
    if args.waterfall:
        print("\n".join(waterfall(end)), file=sys.stderr)
    return 0


if __name__ == "__main__":
    main()
