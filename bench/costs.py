"""How well few numbers tell the time of a step: fits our cost model to public measurements, and reports its errors.

    python -m bench.costs [--quick] [--json FILE] [--write]

Reads the tables below BATON_TRACES (default ../shared/traces beside the repository; without them there is nothing to
report). `--write` makes scheduler/costs/*.json anew. Each case is the 90th percentile of |predicted / measured - 1|;
beside it, where sizes are known, the same of the roofline that would have stood in without the measurements.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.report import Row, emit, median, parser, progress
from scheduler import roofline
from scheduler.cost import CostModel, decode_features
from scheduler.cost_fit import Sample, fit, fit_lines, predicted, prefill_sample, transfer_sample
from scheduler.roofline import A100, CPU, H100, H200, Hardware, Sizes, over

ROOT = Path(__file__).resolve().parent.parent
COSTS = ROOT / "scheduler" / "costs"
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Table:
    """What was measured (or published) about one model on one kind of worker, as samples in seconds."""

    name: str
    source: str
    licence: str
    formula: str
    prefill: list[Sample]
    decode: list[Sample]
    sizes: Sizes
    hardware: Hardware
    lines: int = 2

    def model(self) -> CostModel:
        """Our fit; lanes are those of a roofline."""
        found = fit(self.name, self.prefill, self.decode, lines=self.lines)
        return replace(found, lanes=roofline.LANES)

    def prior(self) -> CostModel:
        """What would stand in for it."""
        return roofline.roofline(self.name, self.sizes, self.hardware)

    def document(self) -> dict[str, object]:
        """The fitted model with where it comes from and how far it is off."""
        model = self.model()
        about = {
            "source": self.source,
            "licence of the measurements": self.licence,
            "composed as": self.formula,
            "fitted by": "python -m bench.costs --write",
            "prefill": error_of(model.prefill, self.prefill).document(),
            "decode": error_of(model.decode, self.decode).document(),
        }
        return {"about": about, **model.document()}


@dataclass(frozen=True, slots=True)
class Error:
    """Of |predicted / measured - 1|."""

    mean: float
    p90: float
    worst: float
    points: int = field(default=0)

    def document(self) -> dict[str, float]:
        """In percent."""
        shares = {"mean_error_%": self.mean, "p90_error_%": self.p90, "worst_error_%": self.worst}
        return {"points": self.points, **{name: round(100 * share, 2) for name, share in shares.items()}}


def error_of(lines: Sequence[Sequence[float]], samples: Iterable[Sample]) -> Error:
    """How far the highest of the lines is off."""
    errors = sorted(abs(predicted(lines, sample.features) / sample.seconds - 1) for sample in samples)
    p90 = errors[math.ceil(0.9 * len(errors)) - 1]
    return Error(sum(errors) / len(errors), p90, errors[-1], len(errors))


def traces() -> Path | None:
    """The folder of public tables, or None where it is not there."""
    folder = Path(os.environ.get("BATON_TRACES") or ROOT.parent / "shared" / "traces")
    return folder if (folder / "distserve_profiler-a100-80g.distserve.json").exists() else None


def cells(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV file, compressed or not."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8", newline="") as text:
            yield from csv.DictReader(text)
    else:
        with path.open(encoding="utf-8", newline="") as text:
            yield from csv.DictReader(text)


# ---------------------------------------------------------------------------------------------------------- DistServe


def distserve_s(coefficients: Mapping[str, Sequence[float]], threshold: int) -> tuple[list[Sample], list[Sample]]:
    """Samples of DistServe's published fits (its simulator's form; one pipeline stage, without Ray's overhead)."""
    a, b, c = coefficients["prefill"]
    prefill = []
    for new in (32, 64, 128, 256, 512, 1024, 2048):
        for count in (1, 2, 4, 8):
            milliseconds = a + b * new * count + c * new * new * count
            prefill.append(prefill_sample([(new, 0)] * count, milliseconds / 1e3))
    decode = []
    for batch in (1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 112, 128, 192, 256):
        a, b, c = coefficients["decoding_smallbs" if batch < threshold else "decoding_largebs"]
        for length in (64, 128, 256, 512, 1024, 2048):
            features = decode_features(batch, batch * length)
            decode.append(Sample(features, (a + b * features[2] + c * batch) / 1e3))
    return prefill, decode


def distserve(folder: Path, engine: str, model: str, tp: int) -> Table:
    """OPT on A100, from the coefficients that DistServe publishes."""
    file = f"distserve_profiler-a100-80g.{engine}.json"
    published = json.loads((folder / file).read_text(encoding="utf-8"))[f"facebook/{model}"][str(tp)]
    prefill, decode = distserve_s(published, published["decoding_large_small_bs_threshold"])
    sizes = over({"opt-13b": roofline.OPT_13B, "opt-66b": roofline.OPT_66B}[model], tp)
    return Table(
        f"a100-{model}-tp{tp}" + ("-vllm" if engine == "vllm" else ""),
        f"LLMServe/DistServe @ 82831f1, simdistserve/estimators/profile_data, {file}",
        "Apache-2.0",
        "the published form a + b*sum(n) + c*sum(n^2), a + b*sum(context) + c*batch (two fits, split by batch), "
        "evaluated on a grid and fitted anew",
        prefill,
        decode,
        sizes,
        A100,
    )


# --------------------------------------------------------------------------------------------- operators on an H200


class Operators:
    """Milliseconds of single operations on an H200 (aiconfigurator's tables for vLLM 0.18)."""

    def __init__(self, folder: Path) -> None:
        self.gemm: dict[int, dict[tuple[int, int], float]] = defaultdict(dict)
        for row in cells(folder / "aic_h200_vllm0.18_gemm_bf16.csv.gz"):
            self.gemm[int(row["m"])][int(row["n"]), int(row["k"])] = float(row["latency"])
        self.context: dict[tuple[int, int], list[tuple[int, int, float]]] = defaultdict(list)
        for row in cells(folder / "aic_h200_vllm0.18_context_attention_bf16.csv.gz"):
            heads = int(row["num_heads"]), int(row["num_key_value_heads"])
            self.context[heads].append((int(row["batch_size"]), int(row["isl"]), float(row["latency"])))
        self.generation: dict[tuple[int, int], list[tuple[int, int, float]]] = defaultdict(list)
        for row in cells(folder / "aic_h200_vllm0.18_generation_attention_bf16.csv.gz"):
            heads = int(row["num_heads"]), int(row["num_key_value_heads"])
            length = int(row["isl"]) + int(row["step"])
            self.generation[heads].append((int(row["batch_size"]), length, float(row["latency"])))
        self._sides = sorted({n for n, _ in self.gemm[1]})

    def linear_ms(self, m: int, n: int, k: int) -> float:
        """A matrix product; between sides that were measured linear in logarithms, beyond them in proportion."""
        n0, n1, over_n = self._around(n)
        k0, k1, over_k = self._around(k)
        found = self.gemm[m]

        def between(a: float, b: float, share: float) -> float:
            return a * math.pow(b / a, share)

        low = between(found[n0, k0], found[n1, k0], over_n)
        high = between(found[n0, k1], found[n1, k1], over_n)
        return between(low, high, over_k) * max(1.0, n / self._sides[-1]) * max(1.0, k / self._sides[-1])

    def _around(self, side: int) -> tuple[int, int, float]:
        sides = self._sides
        if side >= sides[-1]:
            return sides[-1], sides[-1], 0.0
        at = max(i for i, known in enumerate(sides) if known <= side)
        return sides[at], sides[at + 1], math.log(side / sides[at]) / math.log(sides[at + 1] / sides[at])

    def step_ms(self, sizes: Sizes, tokens: int, rows: int) -> float:
        """All linear operations of one step on one rank, and the two all-reduces a layer."""
        ranks, hidden, wide = sizes.tp, sizes.hidden, sizes.intermediate // sizes.tp
        qkv = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim // ranks
        layer = (
            self.linear_ms(tokens, qkv, hidden)
            + self.linear_ms(tokens, hidden, sizes.heads * sizes.head_dim // ranks)
            + self.linear_ms(tokens, 2 * wide, hidden)
            + self.linear_ms(tokens, hidden, wide)
        )
        for known, latency_s, bytes_s in H200.all_reduce:
            if known == ranks:
                layer += 2e3 * (latency_s + tokens * hidden * 2 / bytes_s)
        return sizes.layers * layer + self.linear_ms(rows, sizes.vocab // ranks, hidden)


def h200(operators: Operators, name: str, sizes: Sizes) -> Table:
    """A model on H200s, composed of measured operations."""
    heads = sizes.heads // sizes.tp, sizes.kv_heads // sizes.tp
    prefill, decode = [], []
    for batch, new, attention_ms in operators.context[heads]:
        if batch in BATCHES and batch * new in operators.gemm and 16 <= batch * new <= 32768:
            milliseconds = operators.step_ms(sizes, batch * new, batch) + sizes.layers * attention_ms
            prefill.append(prefill_sample([(new, 0)] * batch, milliseconds / 1e3))
    for batch, length, attention_ms in operators.generation[heads]:
        # What fits beside the weights, in round numbers.
        if batch in BATCHES and 64 <= length <= 32768 and batch * length * sizes.kv_bytes <= 100e9 * sizes.tp:
            milliseconds = operators.step_ms(sizes, batch, batch) + sizes.layers * attention_ms
            decode.append(Sample(decode_features(batch, batch * length), milliseconds / 1e3))
    return Table(
        name,
        "ai-dynamo/aiconfigurator @ 095f58a, systems/data/h200_sxm, tables of vLLM 0.18: gemm, context_attention, "
        "generation_attention (bf16); all-reduce of several ranks: microsoft/apex_plus @ 8769096, profile/comm",
        "Apache-2.0; MIT",
        "layers * (4 matrix products + attention + 2 all-reduces) + the product that makes logits; no norms, sampling "
        "or host time; nothing cached in prefill",
        prefill,
        decode,
        sizes,
        H200,
        lines=3,
    )


# ---------------------------------------------------------------------------------------------------------- Splitwise


def splitwise(folder: Path, hardware: Hardware, column: str, tp: int) -> Table:
    """Llama-2-70B end to end, as Splitwise measured it."""
    prompts: dict[tuple[int, int], list[float]] = defaultdict(list)
    tokens: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    for row in cells(folder / "splitwise_perf_model.csv.gz"):
        if (row["model"], row["hardware"], row["tensor_parallel"]) != ("llama2-70b", column, str(tp)):
            continue
        new, batch, made = int(row["prompt_size"]), int(row["batch_size"]), int(row["token_size"])
        prompts[new, batch].append(float(row["prompt_time"]) / 1e3)
        tokens[new, batch, made].append(float(row["token_time"]) / 1e3)
    return Table(
        f"{hardware.name.removesuffix('-80g')}-llama-2-70b-tp{tp}",
        "Mutinifni/splitwise-sim, data/perf_model.csv",
        "MIT",
        "medians over repeats; decode at half of the tokens made",
        [prefill_sample([(new, 0)] * batch, median(s)) for (new, batch), s in sorted(prompts.items())],
        [
            Sample(decode_features(batch, batch * (new + made // 2)), median(s))
            for (new, batch, made), s in sorted(tokens.items())
        ],
        over(roofline.LLAMA_2_70B, tp),
        hardware,
    )


# --------------------------------------------------------------------------------- parts: linear operations, networks


def vidur_linear(folder: Path, file: str, layers: int) -> dict[int, list[Sample]]:
    """Seconds of all layers' linear and element-wise operations by tokens, for each number of ranks (Vidur)."""
    found: dict[int, list[Sample]] = defaultdict(list)
    for row in cells(folder / file):
        new, ranks = int(row["num_tokens"]), int(row["num_tensor_parallel_workers"])
        # The second norm's column is empty for one model; the rest of a layer is everywhere.
        names = [n for n in row if n.endswith(".median") and n.split(".")[1] not in ("emb",) and row[n]]
        if new <= 8192:
            found[ranks].append(Sample((1.0, float(new)), layers * sum(float(row[n]) for n in names) / 1e3))
    return found


def networks(folder: Path) -> dict[str, list[Sample]]:
    """Seconds of one send and receive by bytes, by link."""
    found: dict[str, list[Sample]] = {}
    for gpu in ("H100-SXM-80GB", "H200-SXM-141GB"):
        found[f"{gpu} NVLink, APEX"] = [
            transfer_sample(int(row["size(kb)"]) * 1024, 1, float(row["time(us)"]) / 1e6)
            for row in cells(folder / f"apex_comm_{gpu}_sendrecv.csv")
            if row["dtype"] == "half"
        ]
    for gpu in ("a100", "h100"):
        for devices, link in ((2, "NVLink"), (1, "between hosts")):
            times: dict[int, list[float]] = defaultdict(list)
            for row in cells(folder / f"vidur_net_{gpu}_dgx_send_recv.csv.gz"):
                if int(row["devices_per_node"]) == devices:
                    times[int(row["size"])].append(float(row["time_stats.send_recv.median"]) / 1e3)
            found[f"{gpu} {link}, Vidur"] = [transfer_sample(size, 1, median(s)) for size, s in sorted(times.items())]
    return found


def cpu_samples() -> tuple[list[Sample], list[Sample]]:
    """What our engine took on this project's machine: bench/results/engine_modes.json, fast mode."""
    report = json.loads((ROOT / "bench" / "results" / "engine_modes.json").read_text(encoding="utf-8"))
    prefill, decode = [], []
    for row in report["rows"]:
        words, rate = row["case"].split(), row["ours"]
        if "prefill" in words:
            prefill.append(prefill_sample([(int(words[-1]), 0)], int(words[-1]) / rate))
        elif "decode" in words:
            batch = int(words[-1])
            decode.append(Sample(decode_features(batch, batch * 256), batch / rate))
    return prefill, decode


# ------------------------------------------------------------------------------------------------------------- report


def tables(folder: Path) -> list[Table]:
    """Every table that a cost model is written for."""
    operators = Operators(folder)
    return [
        *(distserve(folder, "distserve", "opt-13b", tp) for tp in (1, 2, 4)),
        *(distserve(folder, "distserve", "opt-66b", tp) for tp in (2, 4, 8)),
        *(distserve(folder, "vllm", "opt-13b", tp) for tp in (1, 2, 4)),
        h200(operators, "h200-llama-3.1-8b", roofline.LLAMA_3_1_8B),
        h200(operators, "h200-qwen2.5-32b", roofline.QWEN_2_5_32B),
        h200(operators, "h200-llama-3.1-70b-tp4", over(roofline.LLAMA_3_1_70B, 4)),
        *(splitwise(folder, A100, "a100-80gb", tp) for tp in (4, 8)),
        *(splitwise(folder, H100, "h100-80gb", tp) for tp in (4, 8)),
    ]


def measure(folder: Path) -> tuple[list[Row], list[Table]]:
    """The errors of every table, part and network."""
    rows: list[Row] = []

    def report(case: str, ours: Error, peer: Error | None = None) -> None:
        peer_s = None if peer is None else 100 * peer.p90
        rows.append(Row(case, 100 * ours.p90, peer_s, "" if peer is None else "roofline", "% error, p90", False))
        progress(
            f"{case:52} {ours.points:5} points, mean {100 * ours.mean:6.2f} % p90 {100 * ours.p90:6.2f} % worst "
            f"{100 * ours.worst:6.1f} %"
            + (
                ""
                if peer is None
                else f"   roofline {100 * peer.mean:5.1f} {100 * peer.p90:5.1f} {100 * peer.worst:5.1f}"
            )
        )

    found = tables(folder)
    for table in found:
        model, prior = table.model(), table.prior()
        report(f"{table.name} prefill", error_of(model.prefill, table.prefill), error_of(prior.prefill, table.prefill))
        report(f"{table.name} decode", error_of(model.decode, table.decode), error_of(prior.decode, table.decode))
    for file, sizes, hardware in (
        ("vidur_mlp_a100_llama3_8b.csv.gz", roofline.LLAMA_3_1_8B, A100),
        ("vidur_mlp_h100_llama2_7b.csv.gz", roofline.LLAMA_2_7B, H100),
        ("vidur_mlp_h100_llama2_70b.csv.gz", roofline.LLAMA_2_70B, H100),
    ):
        for ranks, samples in sorted(vidur_linear(folder, file, sizes.layers).items()):
            # Neither the embedding's side nor the all-reduce is in these tables.
            bare, alone = replace(sizes, vocab=0, tp=ranks), replace(hardware, all_reduce=((ranks, 0.0, math.inf),))
            errors = sorted(
                abs(roofline.step_s(bare, alone, (), int(s.features[1]), 0) / s.seconds - 1) for s in samples
            )
            peer = Error(sum(errors) / len(errors), errors[math.ceil(0.9 * len(errors)) - 1], errors[-1], len(errors))
            report(f"{file.removesuffix('.csv.gz')} tp{ranks}", error_of(fit_lines(samples, 3), samples), peer)
    for link, samples in networks(folder).items():
        report(f"{link}: setup + bytes", error_of(fit_lines(samples, 1), samples))
    return rows, found


def main() -> None:
    """Run and report."""
    flags = parser("costs", __doc__ or "")
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument("--write", action="store_true", help="write scheduler/costs/*.json")
    options = flags.parse_args()
    rows: list[Row] = []
    folder = traces()
    if folder is None:
        progress("needs the public traces (BATON_TRACES)")
    else:
        rows, found = measure(folder)
        if options.write:
            COSTS.mkdir(exist_ok=True)
            # The coefficients of DistServe's baseline are another engine's: reported, not shipped.
            for table in (table for table in found if not table.name.endswith("-vllm")):
                (COSTS / f"{table.name}.json").write_text(text_of(table.document()), encoding="utf-8")
    prefill, decode = cpu_samples()
    prior = roofline.roofline("cpu", roofline.RANDOM_100M, CPU)
    for case, lines, samples in (("prefill", prior.prefill, prefill), ("decode", prior.decode, decode)):
        worst = error_of(lines, samples)
        progress(f"this CPU, random 100 M, {case}: roofline off by {100 * worst.mean:.1f} %, {100 * worst.worst:.1f} %")
        rows.append(Row(f"cpu random 100 M {case}, roofline", 100 * worst.p90, None, "", "% error, p90", False))
    emit("costs", rows, options.json)


def text_of(document: dict[str, object]) -> str:
    """JSON with one line of numbers a line."""
    parts = []
    for key, value in document.items():
        if isinstance(value, dict):
            inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            parts.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
        elif isinstance(value, list):
            inner = ",\n".join(f"  {json.dumps(entry)}" for entry in value)
            parts.append(f" {json.dumps(key)}: [\n{inner}\n ]")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
