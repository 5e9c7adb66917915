"""The left half of the page: what a visitor sets, to an order and back from a PNG's settings."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import gradio as gr

from var_compressor.models.schedule import ASPECT_RATIOS, PIXEL_BUDGETS
from var_compressor.studio.orders import CFG_RANGE, TAU_RANGE, TOP_P_RANGE, Order
from var_compressor.studio.shelf import Offer

NO_MODEL = "none"
OWN_BUDGET = "full"
Update = dict[Any, Any]


class Form:
    """Components in the order of `inputs`.

    Text fields have no limit of their own: a browser would cut a long prompt without a word.
    """

    def __init__(self, offers: Sequence[Offer], examples: Sequence[str]) -> None:
        """``examples``: prompts that the models can draw; the first one stands there already."""
        self.prompt = gr.Textbox(
            examples[0] if examples else "",
            label="Prompt",
            lines=3,
            max_lines=8,
            autofocus=True,
            elem_id="prompt",
        )
        self.negative = gr.Textbox(label="Negative prompt", elem_id="negative")
        with gr.Row():
            self.draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=90)
            self.cancel = gr.Button("Cancel", elem_id="cancel", min_width=90)
        self._choose_models([offer.name for offer in offers])
        self._choose_seed_and_size()
        self.cfg = gr.Slider(*CFG_RANGE, value=Order.cfg, step=0.1, label="Guidance", elem_id="cfg")
        self.tau = gr.Slider(
            *TAU_RANGE, value=Order.tau, step=0.05, label="Temperature", elem_id="tau"
        )
        self.top_p = gr.Slider(
            *TOP_P_RANGE, value=Order.top_p, step=0.01, label="Top-p", elem_id="top-p"
        )
        self.file = gr.File(
            label="Drop a PNG here to restore its settings",
            file_types=[".png"],
            height=150,
            elem_id="restore",
        )
        if examples:
            gr.Examples([[text] for text in examples], [self.prompt], label="Examples")

    def _choose_models(self, names: list[str]) -> None:
        self.model = gr.Dropdown(names, value=names[0], label="Model", elem_id="model")
        self.other = gr.Dropdown(
            [NO_MODEL, *names],
            value=NO_MODEL,
            label="Compare with",
            info=None if len(names) > 1 else "varc studio ARTIFACT … offers compressed models",
            elem_id="other",
        )

    def _choose_seed_and_size(self) -> None:
        with gr.Row():
            # a text, because a browser's numbers end at 2**53
            self.seed = gr.Textbox("0", label="Seed", max_length=19, elem_id="seed", min_width=90)
            self.dice = gr.Button("Another seed", size="sm", elem_id="dice", min_width=90)
        with gr.Row():
            self.ratio = gr.Dropdown(
                [(ratio_label(ratio), ratio) for ratio in ASPECT_RATIOS],
                value=1.0,
                label="Aspect ratio",
                elem_id="ratio",
                min_width=120,
            )
            self.budget = gr.Dropdown(
                [OWN_BUDGET, *PIXEL_BUDGETS],
                value=OWN_BUDGET,
                label="Pixels",
                elem_id="budget",
                min_width=120,
            )

    @property
    def inputs(self) -> list[Any]:
        return [
            self.prompt,
            self.negative,
            self.model,
            self.other,
            self.seed,
            self.ratio,
            self.budget,
            self.cfg,
            self.tau,
            self.top_p,
        ]

    def order(self, *values: Any) -> Order:
        """Raises: ValueError naming what cannot be."""
        prompt, negative, model, other, seed, ratio, budget, cfg, tau, top_p = values
        return Order.checked(
            {
                "prompt": prompt,
                "negative": negative,
                "models": (model,) if other in (NO_MODEL, None) else (model, other),
                "seed": seed,
                "aspect_ratio": ratio,
                "pixel_budget": None if budget == OWN_BUDGET else budget,
                "cfg": cfg,
                "tau": tau,
                "top_p": top_p,
            }
        )

    def restored(self, settings: dict[str, Any], offers: Sequence[Offer]) -> tuple[Update, str]:
        """Updates that bring an image's settings back, and what to say about them.

        Raises: ValueError for settings that no image can have.
        """
        wanted = settings.get("model")
        known = [offer.name for offer in offers if wanted in (offer.source, offer.name)]
        order = Order.checked({**settings, "models": (known[0] if known else "",)})
        values = (
            order.prompt,
            order.negative,
            known[0] if known else gr.skip(),
            NO_MODEL,
            str(order.seed),
            order.aspect_ratio,
            order.pixel_budget or OWN_BUDGET,
            order.cfg,
            order.tau,
            order.top_p,
        )
        said = "settings restored"
        if not known:
            said += f"; its model, {str(wanted)[:80]}, is not on offer here"
        return dict(zip(self.inputs, values, strict=True)), said


def ratio_label(ratio: float) -> str:
    """Height / width 0.75 → "4:3 wide"."""
    share = Fraction(ratio).limit_denominator(7)
    if share == 1:
        return "1:1 square"
    return f"{share.denominator}:{share.numerator} {'wide' if share < 1 else 'tall'}"
