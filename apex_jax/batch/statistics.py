"""What a job did, in numbers: counted while it runs, summed up as text and as JSON.

Latencies are kept one by one (8 bytes a request and 8 an output), so that percentiles are exact.
"""

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from apex_jax.request import RequestOutput
from apex_jax.sequence import Lane

PERCENTILES = (50, 90, 99)


class Statistics:
    """Counters of one run.

    num_finished: requests with a result. num_failed: error lines. num_skipped: finished by an
    earlier run. input_bytes: size of the input, None if unknown; skipped_bytes and done_bytes are
    the parts of it that were finished before and in this run.
    """

    def __init__(self, input_bytes: int | None) -> None:
        self.input_bytes = input_bytes
        self.num_finished = 0
        self.num_failed = 0
        self.num_skipped = 0
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self.num_host_tokens = 0
        self.num_preemptions = 0
        self.skipped_bytes = 0
        self.done_bytes = 0
        self._ttft_sec = array("d")
        # By the lane that most of a request's tokens came from.
        self._tpot_sec = {lane: array("d") for lane in Lane}

    def add_result(self, outputs: Sequence[RequestOutput], line_bytes: int) -> None:
        """Count a finished request, with all its outputs; they have one prompt."""
        self.num_finished += 1
        self.done_bytes += line_bytes
        self.num_prompt_tokens += len(outputs[0].request.prompt_token_ids)
        self._ttft_sec.append(min(output.ttft_sec for output in outputs))
        for output in outputs:
            self.num_output_tokens += len(output.token_ids)
            self.num_host_tokens += output.num_host_tokens
            self.num_preemptions += output.num_preemptions
            if output.tpot_sec is not None:
                is_of_host = 2 * output.num_host_tokens > len(output.token_ids)
                self._tpot_sec[Lane.HOST if is_of_host else Lane.DEVICE].append(output.tpot_sec)

    def add_failure(self, line_bytes: int) -> None:
        self.num_failed += 1
        self.done_bytes += line_bytes

    def add_skipped(self, line_bytes: int) -> None:
        self.num_skipped += 1
        self.skipped_bytes += line_bytes

    @property
    def num_done(self) -> int:
        """Lines answered in this run."""
        return self.num_finished + self.num_failed

    @property
    def fraction_done(self) -> float | None:
        """Share of this run's work that is done, by bytes of input; None while unknown."""
        if self.input_bytes is None:
            return None
        work = self.input_bytes - self.skipped_bytes
        return min(1.0, self.done_bytes / work) if work > 0 else 1.0

    def to_json(self, wall_sec: float) -> dict[str, Any]:
        """Return everything as JSON values. wall_sec: from the first request to the last result."""
        per_sec = 1 / wall_sec if wall_sec > 0 else 0.0
        return {
            "requests": {
                "finished": self.num_finished,
                "failed": self.num_failed,
                "finished_before": self.num_skipped,
            },
            "prompt_tokens": self.num_prompt_tokens,
            "output_tokens": self.num_output_tokens,
            "output_tokens_by_lane": {
                "device": self.num_output_tokens - self.num_host_tokens,
                "host": self.num_host_tokens,
            },
            "preemptions": self.num_preemptions,
            "wall_sec": wall_sec,
            "requests_per_sec": self.num_finished * per_sec,
            "prompt_tokens_per_sec": self.num_prompt_tokens * per_sec,
            "output_tokens_per_sec": self.num_output_tokens * per_sec,
            "ttft_sec": summarize(self._ttft_sec),
            "tpot_sec": summarize(sum(self._tpot_sec.values(), array("d"))),
            "tpot_sec_by_lane": {
                lane.value: summarize(times) for lane, times in self._tpot_sec.items()
            },
        }


def summarize(values: "array[float]") -> dict[str, float] | None:
    """Return mean, percentiles (the smallest value that so many percent do not exceed) and max."""
    if not values:
        return None
    ordered = sorted(values)
    count = len(ordered)
    ranks = {f"p{p}": ordered[max(0, -(-count * p // 100) - 1)] for p in PERCENTILES}
    return {"mean": sum(ordered) / count, **ranks, "max": ordered[-1]}


def format_summary(metrics: Mapping[str, Any]) -> str:
    """Return the summary of a job, several lines, from what --metrics holds as JSON."""
    requests = metrics["requests"]
    lines = [
        f"requests   {requests['finished']} finished, {requests['failed']} failed, "
        f"{requests['finished_before']} finished before",
        f"time       {metrics['wall_sec']:.2f} s of work, {metrics['startup_sec']:.2f} s to start"
        + (f", {metrics['compile_sec']:.2f} s of it compiling" if metrics["compile_sec"] else ""),
        f"throughput {metrics['requests_per_sec']:.2f} requests/s, "
        f"{metrics['prompt_tokens_per_sec']:.1f} prompt tokens/s, "
        f"{metrics['output_tokens_per_sec']:.1f} output tokens/s",
    ]
    for name, title in (("ttft_sec", "TTFT"), ("tpot_sec", "TPOT")):
        times = metrics[name]
        if times is not None:
            lines.append(f"{title}       {_format_times(times)}")
    reuse = metrics["prefix_reuse"]
    if reuse is not None:
        lines.append(
            f"prefixes   {reuse['reused_tokens']} of {reuse['admitted_tokens']} prompt tokens "
            f"reused ({100 * reuse['hit_rate']:.1f} %)"
        )
    if metrics["hybrid"] is not None:
        lines += _hybrid_lines(metrics)
    peaks = metrics["peak_bytes"]
    if peaks:
        shown = ", ".join(f"{tier} {format_bytes(size)}" for tier, size in peaks.items())
        lines.append(f"peak bytes {shown}")
    return "\n".join(lines)


def _hybrid_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Return what the host lane added and how well it was hidden."""
    hybrid, num_host = metrics["hybrid"], metrics["output_tokens_by_lane"]["host"]
    percent = 100 * num_host / max(1, metrics["output_tokens"])
    lines = [
        f"host lane  {num_host} of {metrics['output_tokens']} output tokens ({percent:.1f} %); "
        f"{hybrid['num_merges']} merges, {hybrid['num_extra_passes']} extra passes, "
        f"{hybrid['num_late']} late cohorts",
    ]
    for lane, times in metrics["tpot_sec_by_lane"].items():
        if times is not None:
            lines.append(f"{'  ' + lane:<11}TPOT {_format_times(times)}")
    lines.append(
        f"busy       device {hybrid['device_busy_percent']:.1f} %, "
        f"host {hybrid['host_busy_percent']:.1f} %, "
        f"{hybrid['overlap_percent']:.1f} % of the host's time overlaps the device's; "
        f"{hybrid['num_bubbles']} bubbles, {hybrid['bubble_sec']:.3f} s in all"
    )
    return lines


def _format_times(times: Mapping[str, float]) -> str:
    shown = ", ".join(f"p{p} {1e3 * times[f'p{p}']:.1f}" for p in PERCENTILES)
    return f"{shown} ms, mean {1e3 * times['mean']:.1f} ms"


def format_bytes(num_bytes: int) -> str:
    """Return a size with a binary unit and two decimals."""
    if num_bytes < 1024:
        return f"{num_bytes} B"
    exponent = min((num_bytes.bit_length() - 1) // 10, 4)
    return f"{num_bytes / 1024**exponent:.2f} {('KiB', 'MiB', 'GiB', 'TiB')[exponent - 1]}"


def format_duration(seconds: float) -> str:
    """Return h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
