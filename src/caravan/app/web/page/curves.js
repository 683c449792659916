// Curves as inline SVG: axes with units, one line a series, what is under the pointer in numbers.

import { drawn, element } from "./elements.js";

const HEIGHT = 210;
const EDGE = { left: 56, right: 14, top: 12, bottom: 40 };

/**
 * A chart that fits its place and is drawn again when that changes.
 * @param {{title: string, unit: string, across: string, series: {name: string, values: (number|null)[]}[],
 *   places: number[], show: (value: number) => string, zero: boolean}} chart
 *   `places` are the x values; values are of equal length, null where not measured.
 */
export function curves(chart) {
  const place = element("div", { class: "chart-area" });
  const legend = element(
    "span",
    { class: "legend" },
    ...(chart.series.length > 1
      ? chart.series.map(({ name }, number) => element("span", { class: `key series-${number}` }, name))
      : []),
  );
  const caption = element("figcaption", {}, element("strong", {}, chart.title), legend);
  const width = () => Math.max(240, place.clientWidth);
  let drawnFor = 0;
  new ResizeObserver(() => {
    if (width() !== drawnFor) place.replaceChildren(picture(chart, (drawnFor = width())));
  }).observe(place);
  return element("figure", { class: "chart" }, caption, place);
}

function picture(chart, width) {
  const all = chart.series.flatMap(({ values }) => values.filter((value) => value !== null));
  const ticks = nice(chart.zero ? Math.min(0, ...all) : Math.min(...all), Math.max(...all), 4);
  const [low, high] = [ticks[0], ticks.at(-1)];
  const [first, last] = [chart.places[0], chart.places.at(-1)];
  const x = (value) =>
    EDGE.left + ((value - first) / (last - first || 1)) * (width - EDGE.left - EDGE.right) + (last === first ? 8 : 0);
  const y = (value) => HEIGHT - EDGE.bottom - ((value - low) / (high - low || 1)) * (HEIGHT - EDGE.top - EDGE.bottom);
  const size = { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT };
  const svg = drawn("svg", { ...size, role: "img", "aria-label": said(chart) });
  for (const tick of ticks) {
    svg.append(
      drawn("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y(tick), y2: y(tick) }),
      drawn("text", { class: "tick", x: EDGE.left - 8, y: y(tick) + 4, "text-anchor": "end" }, chart.show(tick)),
    );
  }
  const whole = nice(first, last, Math.max(4, Math.floor(width / 90))).filter(
    (tick) => Number.isInteger(tick) && tick >= first && tick <= last,
  );
  for (const tick of whole) {
    const place = { x: x(tick), y: HEIGHT - EDGE.bottom + 18, "text-anchor": "middle" };
    svg.append(drawn("text", { class: "tick", ...place }, tick));
  }
  svg.append(
    drawn("text", { class: "axis", x: width - EDGE.right, y: HEIGHT - 4, "text-anchor": "end" }, chart.across),
    drawn("text", { class: "axis", x: 0, y: HEIGHT - 4 }, chart.unit),
  );
  for (const [number, { values }] of chart.series.entries()) {
    const points = values.flatMap((value, index) => (value === null ? [] : [[x(chart.places[index]), y(value)]]));
    svg.append(drawn("path", { class: `curve series-${number}`, d: path(points) }));
    const [cx, cy] = points.at(-1) ?? [0, 0];
    if (points.length) svg.append(drawn("circle", { class: `dot series-${number}`, cx, cy, r: 3.5 }));
  }
  svg.append(reading(chart, svg, x, width));
  return svg;
}

/** A line under the pointer with the numbers there. */
function reading(chart, svg, x, width) {
  const rule = drawn("line", { class: "rule", y1: EDGE.top, y2: HEIGHT - EDGE.bottom });
  const words = drawn("text", { class: "reading", y: EDGE.top + 4 });
  const group = drawn("g", { class: "pointer", visibility: "hidden" }, rule, words);
  svg.addEventListener("pointermove", (event) => {
    const at = event.clientX - svg.getBoundingClientRect().left;
    const distances = chart.places.map((place) => Math.abs(x(place) - at));
    const index = distances.indexOf(Math.min(...distances));
    const place = x(chart.places[index]);
    rule.setAttribute("x1", place);
    rule.setAttribute("x2", place);
    const right = place > width / 2;
    words.setAttribute("x", place + (right ? -6 : 6));
    words.setAttribute("text-anchor", right ? "end" : "start");
    const values = chart.series.map(({ values }) => (values[index] === null ? "–" : chart.show(values[index])));
    words.textContent = `${chart.places[index]}: ${values.join(" / ")}`;
    group.setAttribute("visibility", "visible");
  });
  svg.addEventListener("pointerleave", () => group.setAttribute("visibility", "hidden"));
  return group;
}

function path(points) {
  return points.map(([x, y], index) => `${index ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
}

function said(chart) {
  const parts = chart.series.map(({ name, values }) => {
    const known = values.filter((value) => value !== null);
    return `${name}: from ${chart.show(known[0])} to ${chart.show(known.at(-1))}`;
  });
  return `${chart.title}, ${chart.unit}, by ${chart.across}. ${parts.join("; ")}. The table below has all numbers.`;
}

/** Round numbers that enclose a range: steps of 1, 2 or 5 times a power of ten. */
export function nice(low, high, parts) {
  const span = high - low || Math.abs(high) || 1;
  const rough = span / parts;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const digits = Math.max(0, -Math.floor(Math.log10(step)));
  const first = Math.floor(low / step + 1e-9);
  const last = Math.max(first + 1, Math.ceil(high / step - 1e-9));
  return Array.from({ length: last - first + 1 }, (_, index) => Number(((first + index) * step).toFixed(digits)));
}
