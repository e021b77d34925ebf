"""Charts of how a run went: its stages, matching, training, and what a diagnosis tried."""

from __future__ import annotations

from collections.abc import Sequence

from softprompt_kernels.compress.evaluate.diagnosis import Diagnosis
from softprompt_kernels.compress.evaluate.student_names import STUDENT_NAMES
from softprompt_kernels.compress.report.durations import duration
from softprompt_kernels.compress.report.html.chart import Chart, add_line, log_axis, new_figure, number
from softprompt_kernels.compress.report.html.run_data import RunData
from softprompt_kernels.compress.report.metrics import heldout_points, matching_error, smooth

SMOOTHED = "mean of the last 10 steps"


def run_charts(run: RunData) -> list[Chart]:
    """The charts of the stages that the run has."""
    charts = [stages_chart(run), matching_chart(run), training_chart(run), steps_chart(run)]
    return [chart for chart in charts if chart is not None]


def stages_chart(run: RunData) -> Chart | None:
    """Seconds of each stage; None for a run that did not store them."""
    stages = run.figures.get("stages") or {}
    if not stages:
        return None
    names = [name.replace("_", " ") for name in stages]
    seconds = list(stages.values())
    figure = new_figure("seconds", "", showlegend=False)
    figure.add_bar(
        x=seconds,
        y=names,
        orientation="h",
        text=[duration(one) for one in seconds],
        textposition="auto",
        meta={"role": "prompt"},
        hovertemplate="%{y}: %{text}<extra></extra>",
    )
    figure.update_yaxes(autorange="reversed", dtick=1)
    longest = max(stages, key=lambda name: stages[name])
    summary = (
        f"Together {duration(sum(seconds))}. The longest stage is {longest.replace('_', ' ')} with "
        f"{duration(stages[longest])}."
    )
    return Chart("stages", "Time of each stage", summary, figure, 90 + 30 * len(names))


def matching_chart(run: RunData) -> Chart | None:
    """The error of refinement."""
    if not run.matching:
        return None
    steps, error = matching_error(run.matching)
    figure = new_figure("step of matching", "relative squared error", yaxis=log_axis(error))
    add_line(figure, steps, error, "each step", "loss", line={"width": 1}, opacity=0.5)
    smoothed = smooth(error)
    add_line(figure, steps, smoothed, SMOOTHED, "loss")
    summary = (
        "The error of the attention output with the prompt instead of the context, mean over heads and layers, on the "
        f"rows of each step: from {number(error[0])} to {number(smoothed[-1])}."
    )
    return Chart("matching", "Matching", summary, figure)


def training_chart(run: RunData) -> Chart | None:
    """Training loss, held-out KL and the baselines."""
    if not run.training:
        return None
    heldout = run.figures.get("heldout") or {}
    steps = [record["step"] for record in run.training]
    loss = [record["loss"] for record in run.training]
    points = heldout_points(run.training, run.figures)
    baselines = [(key, heldout.get(f"kl_{key}")) for key in ("none", "truncated", "untrained")]
    drawn = [*loss, *(value for _, value in (*points, *baselines))]
    figure = new_figure("step of training", "nats per token", yaxis=log_axis(drawn))
    add_line(figure, steps, loss, "training loss, each step", "loss", line={"width": 1}, opacity=0.5)
    add_line(figure, steps, smooth(loss), f"training loss, {SMOOTHED}", "loss")
    if points:
        x, y = zip(*points, strict=True)
        add_line(figure, x, y, "held-out KL", "prompt", mode="lines+markers")
    for key, value in baselines:
        if value is not None:
            ends = [points[0][0] if points else steps[0], steps[-1]]
            add_line(figure, ends, [value, value], f"held-out KL, {STUDENT_NAMES[key]}", key)
    summary = f"The training loss goes from {number(loss[0])} to {number(smooth(loss)[-1])} nats per token"
    if len(points) > 1:
        summary += f", the held-out KL from {number(points[0][1])} to {number(points[-1][1])}"
    return Chart("training", "Training", f"{summary}.", figure, 400)


def steps_chart(run: RunData) -> Chart | None:
    """Gradient norm of each step, beside the learning rate."""
    norms = [record.get("grad_norm") for record in run.training]
    if not any(norms):
        return None
    steps = [record["step"] for record in run.training]
    rates = [record.get("learning_rate") for record in run.training]
    figure = new_figure("step of training", "gradient norm [nats]", yaxis=log_axis(norms))
    add_line(figure, steps, norms, "gradient norm", "loss")
    figure.update_layout(
        yaxis2={
            "title": {"text": "learning rate"},
            "overlaying": "y",
            "side": "right",
            "showgrid": False,
            "automargin": True,
            "rangemode": "tozero",
            "tickmode": "auto",
            "nticks": 6,
            "zeroline": False,
        }
    )
    add_line(figure, steps, rates, "learning rate", "marker", yaxis="y2", line={"width": 2, "dash": "dash"})
    known = [norm for norm in norms if norm]
    summary = f"The gradient norm lies between {number(min(known))} and {number(max(known))} nats."
    return Chart("steps", "Gradient norm and learning rate", summary, figure)


def diagnosis_charts(diagnosis: Diagnosis) -> list[Chart]:
    """Recovered against k, and the rate range test, as far as the diagnosis needed them."""
    charts = []
    if diagnosis.capacity:
        charts.append(_capacity_chart(diagnosis))
    if diagnosis.rate_test is not None and diagnosis.rate_test.points:
        charts.append(_rate_chart(diagnosis))
    return charts


def _capacity_chart(diagnosis: Diagnosis) -> Chart:
    tokens = [point.tokens for point in diagnosis.capacity]
    heldout = [point.heldout for point in diagnosis.capacity]
    figure = new_figure("tokens of the prompt", "recovered", xaxis={"type": "log"})
    figure.update_xaxes(tickvals=tokens, ticktext=[str(one) for one in tokens])
    add_line(figure, tokens, heldout, "held-out, by matching alone", "untrained", mode="lines+markers")
    train = [point.train for point in diagnosis.capacity]
    add_line(figure, tokens, train, "training queries, by matching alone", "truncated", mode="lines+markers")
    own = diagnosis.heldout_recovered
    if own is not None:
        star = {"symbol": "star", "size": 14}
        add_line(figure, [diagnosis.prompt_tokens], [own], "this run, held-out", "prompt", mode="markers", marker=star)
    best = max(range(len(tokens)), key=heldout.__getitem__)
    summary = (
        f"By matching alone, in closed form, {tokens[best]} tokens recover most on held-out queries: "
        f"{number(heldout[best])}."
        + (f" This run has {diagnosis.prompt_tokens} tokens and recovers {number(own)}." if own is not None else "")
    )
    return Chart("capacity", "Recovered against the length of the prompt", summary, figure)


def _rate_chart(diagnosis: Diagnosis) -> Chart:
    test = diagnosis.rate_test
    assert test is not None
    losses: Sequence[float] = [point.loss for point in test.points]
    figure = new_figure("learning rate", "loss after the step", xaxis=log_axis(point.rate for point in test.points))
    add_line(figure, [point.rate for point in test.points], losses, "loss", "loss", mode="lines+markers")
    ends = [min(*losses, test.start_loss), max(*losses, test.start_loss)]
    add_line(figure, [test.run_rate] * 2, ends, "learning rate of this run", "prompt")
    summary = f"The loss starts at {number(test.start_loss)}. This run had a learning rate of {number(test.run_rate)}"
    if test.suggested is None:
        summary += "; the loss falls at none of the rates."
    else:
        add_line(figure, [test.suggested] * 2, ends, "suggested", "marker", line={"width": 2, "dash": "dash"})
        summary += f"; {number(test.suggested)} is suggested."
    return Chart("rate", "Rate range test", summary, figure)
