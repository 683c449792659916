// The page Training: curves, numbers, what is promised and what was sent, live; and the results that were marked.

import { curves } from "./curves.js";
import { counted, element, icon, partsOf, percent, show } from "./elements.js";
import { forgetMarks, keep } from "./marks.js";
import { facts } from "./search.js";
import { served } from "./served.js";
import { ask, events, isAbort, withQuery } from "./service.js";
import { clearTrouble, sentence, showTrouble } from "./trouble.js";
import { toast } from "./toast.js";

const SHOWN_MARKS = 10;
const AGAIN = 3000; // milliseconds until a stream that ended is opened again
const NAMES = { recall: "Recall", mrr: "MRR", ndcg: "nDCG" };
const STATES = {
  none: "There is no training to follow",
  running: "Running",
  finished: "Finished",
  stopped: "Stopped before its end",
};

export function trainingPage(root) {
  const parts = partsOf(root);
  const table = element("table", { class: "numbers" });
  const scroll = element("div", { class: "scroll", role: "region", "aria-label": "All numbers", tabindex: "0" }, table);
  const charts = element("div", { class: "charts" });
  const about = element("div", { class: "about-training" });
  const results = element("div");
  const numbers = element("div", {}, element("h2", {}, "All numbers"), scroll);
  let last = null;

  async function follow() {
    last?.abort();
    last = new AbortController();
    const { signal } = last;
    for (;;) {
      try {
        tell(await ask("training", { signal }));
        clearTrouble(parts.trouble);
        for await (const { name, data } of events("training/events", { signal })) if (name === "training") tell(data);
      } catch (error) {
        if (signal.aborted || isAbort(error)) return;
        showTrouble(parts.trouble, error, follow);
        return;
      }
      await new Promise((resolve) => setTimeout(resolve, AGAIN)); // the service ended the stream in good order
      if (signal.aborted) return;
    }
  }

  function tell(training) {
    const { state, points, now } = training;
    parts.status.textContent = inWords(training);
    parts.status.dataset.state = state;
    // Not in the line above, which is read aloud: this changes every few seconds.
    show(parts.now, now && `${now.task}: ${percent(now.done / (now.total || 1))}`);
    if (state === "none") {
      show(parts.training, ...howTo());
      return;
    }
    if (!charts.isConnected) show(parts.training, about, charts, numbers, results);
    about.replaceChildren(...what(training));
    charts.replaceChildren(...(points.length ? chartsOf(points) : []));
    numbers.hidden = points.length === 0;
    if (points.length) table.replaceChildren(...rowsOf(points));
    results.replaceChildren(...measured(training.measures));
  }

  async function marks() {
    try {
      const [{ marks, total }, info] = await Promise.all([ask(withQuery("marks", { limit: SHOWN_MARKS })), served()]);
      show(parts.marks, ...marksOf(marks, total, info, marksAgain));
    } catch {
      show(parts.marks); // the page is about the training; the marks are also beside the results
    }
  }
  function marksAgain() {
    forgetMarks();
    marks();
  }

  return {
    show() {
      follow();
      marks();
    },
    hide: () => last?.abort(),
    anew() {
      follow();
      marks();
    },
  };
}

function inWords({ state, folder, points }) {
  const words = folder && state !== "none" ? `${STATES[state]}: ${folder}` : STATES[state];
  const point = points.at(-1);
  return state === "running" && point ? `${words}. ${point.stage} ${point.step} of ${point.of}` : words;
}

function howTo() {
  return [
    element("p", {}, "A training or a federation is drawn here while it runs. Name its folder to the service:"),
    element("p", {}, element("code", {}, "caravan serve my-retriever --training next-retriever")),
    element("p", {}, element("code", {}, "caravan train my-data --out next-retriever")),
  ];
}

function what({ settings, privacy, points }) {
  const up = total(points, "bytes_up");
  const down = total(points, "bytes_down");
  const alone = up === null && down === null;
  const sent = alone ? "nothing, it is trained on one machine" : `${size(up ?? 0)} up, ${size(down ?? 0)} down`;
  const epsilon = points.findLast((point) => point.epsilon !== null)?.epsilon;
  return [
    element(
      "div",
      { class: "card" },
      element("h2", {}, "Privacy"),
      element("p", {}, privacy || "Nothing is said about privacy."),
      facts([
        ["Privacy spent", epsilon === undefined ? null : `ε = ${epsilon.toFixed(2)}`],
        ["Sent over the network", sent],
      ]),
    ),
    element(
      "div",
      { class: "card settings" },
      element("h2", {}, "Settings"),
      facts(Object.entries(settings).map(([name, value]) => [named(name), said(value)])),
    ),
  ];
}

function chartsOf(points) {
  const federated = points.some((point) => point.bytes_up !== null || point.bytes_down !== null);
  const stages = new Set(points.map((point) => point.stage));
  const word = federated ? "round" : "epoch";
  const across = stages.size > 1 ? `${word}, all stages in a row` : word;
  const places = points.map((_, index) => index + 1);
  const of = (name, field) => ({ name, values: points.map((point) => point[field]) });
  const each = [
    { title: "Loss", unit: "nats", series: [of("Loss", "loss")], show: short, zero: true },
    { title: "Recall@1", unit: "validation queries", series: [of("Recall@1", "recall_at_1")], show: percent },
    {
      title: "Sent",
      unit: `bytes a ${word}`,
      series: [of("Up", "bytes_up"), of("Down", "bytes_down")],
      show: size,
      zero: true,
    },
    { title: "Privacy spent", unit: "ε", series: [of("ε", "epsilon")], show: short, zero: true },
  ];
  const known = each.map((chart) => ({
    ...chart,
    series: chart.series.filter(({ values }) => values.some((value) => value !== null)),
  }));
  return known.filter(({ series }) => series.length).map((chart) => curves({ ...chart, across, places }));
}

function rowsOf(points) {
  const columns = [
    ["Stage", (point) => point.stage],
    ["Step", (point) => `${point.step} of ${point.of}`],
    ["Loss", (point) => short(point.loss)],
    ["Recall@1", (point) => (point.recall_at_1 === null ? "–" : percent(point.recall_at_1))],
    ["Seconds", (point) => short(point.seconds)],
    ["Up", (point) => size(point.bytes_up)],
    ["Down", (point) => size(point.bytes_down)],
    ["ε", (point) => short(point.epsilon)],
  ].filter(([, value]) => points.some((point) => value(point) !== "–"));
  const head = element("tr", {}, ...columns.map(([name]) => element("th", { scope: "col" }, name)));
  const rows = points.map((point) => element("tr", {}, ...columns.map(([, value]) => element("td", {}, value(point)))));
  return [
    element("caption", { class: "unseen" }, "Loss, recall and what was sent, step by step"),
    element("thead", {}, head),
    element("tbody", {}, ...rows.reverse()), // the newest first
  ];
}

/** Measures of a finished training: {split, results: {method: {metrics: {measure: {value, low, high}}, seconds}}}. */
function measured({ split, results } = {}) {
  const methods = Object.entries(results ?? {}).map(([name, result]) => [name, result.metrics ?? {}]);
  if (methods.length === 0) return [];
  const names = [...new Set(methods.flatMap(([, metrics]) => Object.keys(metrics)))];
  const head = ["Method", ...names.map(named)].map((name) => element("th", { scope: "col" }, name));
  const row = ([method, metrics]) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, method),
      ...names.map((name) => element("td", {}, ...value(metrics[name]))),
    );
  const table = element(
    "table",
    { class: "numbers" },
    element("caption", { class: "unseen" }, "Measures by method"),
    element("thead", {}, element("tr", {}, ...head)),
    element("tbody", {}, ...methods.map(row)),
  );
  const scroll = element("div", { class: "scroll", role: "region", "aria-label": "Measures", tabindex: "0" }, table);
  return [element("h2", {}, `On ${split} queries`), scroll];
}

function value(measure) {
  if (measure === null || measure === undefined) return ["–"];
  if (typeof measure !== "object") return [said(measure)];
  const bounds = measure.low < measure.high ? ` ${percent(measure.low)} to ${percent(measure.high)}` : null;
  return [percent(measure.value), bounds && element("span", { class: "hint" }, bounds)];
}

function marksOf(marks, total, info, again) {
  const rows = marks.map((mark) => {
    const word = mark.right ? "right" : "wrong";
    const back = async () => {
      try {
        await keep(mark.query, mark.doc_id, null);
        toast("The mark is taken back.");
      } catch (error) {
        toast(`Not taken back. ${sentence(error.message)}`);
      }
      again();
    };
    return element(
      "li",
      {},
      element("span", { class: `verdict ${mark.right ? "good" : "bad"}` }, icon(word), word),
      element("span", { class: "what" }, `“${mark.query}” `, element("code", {}, mark.doc_id)),
      element("button", { type: "button", class: "quiet", disabled: !info.can_change, onclick: back }, "Take back"),
    );
  });
  const words = [
    `${counted(total, "result")} marked so far. A training learns from them with `,
    element("code", {}, `caravan improve ${info.model_id}`),
    ".",
  ];
  return [element("h2", {}, "Marked results"), element("p", {}, ...words), element("ul", { class: "marked" }, ...rows)];
}

function total(points, field) {
  const known = points.map((point) => point[field]).filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) : null;
}

function size(bytes) {
  if (bytes === null) return "–";
  const power = bytes < 1000 ? 0 : Math.min(3, Math.floor(Math.log10(bytes) / 3));
  return `${Number((bytes / 1000 ** power).toPrecision(3))} ${["B", "kB", "MB", "GB"][power]}`;
}

function short(number) {
  return number === null ? "–" : String(Number(number.toPrecision(3)));
}

function named(name) {
  const [word, ...rest] = name.replaceAll("_", " ").split("@");
  return [NAMES[word] ?? word.charAt(0).toUpperCase() + word.slice(1), ...rest].join("@");
}

function said(value) {
  if (typeof value === "number") return value.toLocaleString("en", { maximumSignificantDigits: 4 });
  return value !== null && typeof value === "object" ? JSON.stringify(value) : String(value);
}
