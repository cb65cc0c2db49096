// A line chart in plain SVG: points with whiskers over a measure of bytes, and marks that stand for one value.

import { h, svg } from "./dom.js";
import { bytes, percent } from "./format.js";

const HEIGHT = 300;
const [WIDE, NARROW] = [640, 330];  // on a small screen fewer numbers stand on the axis, as large as elsewhere
const [LEFT, RIGHT, TOP, BOTTOM] = [46, 22, 14, 40];
const APART = 5;  // pixels between the points of two series at one size, so that equal ones don't hide each other

// series: [{ name, points: [{ x, y, low, high, title }] }]; marks: [{ x | y, name }]
export function chart(label, series, marks = []) {
  const widest = Math.max(1, ...series.flatMap(({ points }) => points.map(({ x }) => x)), ...marks.map(({ x }) => x ?? 0));
  const small = window.matchMedia("(max-width: 46rem)").matches;
  const width = small ? NARROW : WIDE;
  const across = (x) => LEFT + (x / widest) * (width - LEFT - RIGHT);
  const up = (y) => HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM);
  const picture = svg("svg", { class: "chart", viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": label },
    axes(widest, width, small ? [0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1], across, up),
    marks.map((mark) => line(mark, width, across, up)),
    series.map(({ points }, at) => curve(points, at, (x) => across(x) + APART * (at - (series.length - 1) / 2), up)));
  return h("div", {}, h("div", { class: "scroll", role: "region", "aria-label": "Chart", tabindex: "0" }, picture),
    legend(series, marks));
}

function axes(widest, width, shares, across, up) {
  const grid = [0, 0.25, 0.5, 0.75, 1].map((y) => [
    svg("line", { class: y === 0 ? "axis" : "grid", x1: LEFT, x2: width - RIGHT, y1: up(y), y2: up(y) }),
    svg("text", { x: LEFT - 8, y: up(y) + 4, "text-anchor": "end" }, percent(y, 0))]);
  const ticks = shares.map((share) =>
    svg("text", { x: across(share * widest), y: HEIGHT - BOTTOM + 18, "text-anchor": share === 0 ? "start" : share === 1 ? "end" : "middle" },
      share === 0 ? "0" : bytes(share * widest)));
  return [...grid, ...ticks, svg("text", { x: (LEFT + width - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" },
    "memory of the experts")];
}

function line({ x, y }, width, across, up) {
  return svg("line", x === undefined
    ? { class: "mark", x1: LEFT, x2: width - RIGHT, y1: up(y), y2: up(y) }
    : { class: "mark", x1: across(x), x2: across(x), y1: TOP, y2: up(0) });
}

function curve(points, at, across, up) {
  const sorted = [...points].sort((a, b) => a.x - b.x);
  const path = sorted.map(({ x, y }) => `${across(x)},${up(y)}`).join(" ");
  return svg("g", { class: `s${at % 6}` },
    svg("polyline", { class: "line", points: path }),
    sorted.filter(({ low }) => low !== undefined).map(({ x, low, high }) =>
      svg("line", { class: "whisker", x1: across(x), x2: across(x), y1: up(low), y2: up(high) })),
    sorted.map(({ x, y, title }) =>
      svg("circle", { class: "point", cx: across(x), cy: up(y), r: 4.5 }, svg("title", {}, title))));
}

function legend(series, marks) {
  const dots = series.map(({ name }, at) => [name, svg("circle", { class: `s${at % 6}`, cx: 7, cy: 7, r: 5 })]);
  const dashes = marks.map(({ x, name }) => [name, x === undefined
    ? svg("line", { class: "mark", x1: 0, x2: 14, y1: 7, y2: 7 })
    : svg("line", { class: "mark", x1: 7, x2: 7, y1: 0, y2: 14 })]);
  return h("ul", { class: "legend" }, [...dots, ...dashes].map(([name, sign]) =>
    h("li", {}, svg("svg", { class: "swatch", viewBox: "0 0 14 14", "aria-hidden": "true" }, sign), name)));
}
