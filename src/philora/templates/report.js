"use strict";
// Charts that can be read, zoomed, smoothed and put on a log scale; answers that can be filtered and sorted; the copy
// button. The page reads the same without it.

const element = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

const shown = (value) => {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e").replaceAll("-", "−");
  const text = Number(value.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: size < 1 ? 6 : 3 });
  return text.replace("-", "−");
};

function smoothed(points, span) {
  let values = points.map((point) => point[1]);
  const radius = Math.round(span / 4);
  if (radius < 1) return points;
  for (let pass = 0; pass < 2; pass += 1) {
    const sums = [0];
    for (const value of values) sums.push(sums.at(-1) + value);
    values = values.map((_, index) => {
      const reach = Math.min(radius, index, values.length - 1 - index);
      return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1);
    });
  }
  return points.map((point, index) => [point[0], values[index]]);
}

function ticks(low, high, count) {
  if (!(high > low)) high = low + (Math.abs(low) || 1);
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const marks = [];
  for (let index = Math.floor(low / step + 1e-9); index <= Math.ceil(high / step - 1e-9); index += 1) {
    marks.push(Number((index * step).toPrecision(12)));
  }
  return marks;
}

function logTicks(low, high) {
  const marks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const factor of [1, 2, 5]) marks.push(factor * 10 ** power);
  }
  const below = marks.filter((mark) => mark <= low).at(-1), above = marks.find((mark) => mark >= high);
  const kept = marks.filter((mark) => mark >= below && mark <= above).map((mark) => Number(mark.toPrecision(6)));
  return kept.length > 1 ? kept : [kept[0], kept[0] * 10];
}

class Chart {
  constructor(figure) {
    this.data = JSON.parse(figure.dataset.chart);
    this.find = (name) => figure.querySelector(name);
    this.plot = this.find(".plot");
    this.paths = [...figure.querySelectorAll("path")];
    this.kept = this.find(".kept");
    this.keptStep = this.kept ? this.data.left + (parseFloat(this.kept.style.left) / 100) * (this.data.right - this.data.left) : 0;
    this.view = { left: this.data.left, right: this.data.right, log: false, smoothing: 1 };
    this.frame = { ...this.data, log: false };
    this.lines = this.data.curves.map((curve) => smoothed(curve.points, curve.span));
    this.noisy = this.data.curves.some((curve) => curve.span > 0);
    this.positive = this.data.curves.every((curve) => curve.points.every((point) => point[1] > 0));
  }

  across(x) { return (x - this.frame.left) / (this.frame.right - this.frame.left); }

  down(y) {
    const { log, bottom, top } = this.frame;
    return log ? 1 - Math.log(y / bottom) / Math.log(top / bottom) : 1 - (y - bottom) / (top - bottom);
  }

  draw(changes) {
    Object.assign(this.view, changes);
    const { left, right } = this.view, log = this.view.log && this.positive;
    this.lines = this.data.curves.map((curve) => smoothed(curve.points, curve.span * this.view.smoothing));
    const inside = this.lines.flat().filter((point) => point[0] >= left && point[0] <= right).map((point) => point[1]);
    if (!inside.length) return;
    let low = Math.min(...inside);
    const high = Math.max(...inside);
    if (this.data.zero && !log) low = Math.min(0, low);
    const marks = log ? logTicks(low, high) : ticks(low, high, 4);
    this.frame = { left, right, bottom: marks[0], top: marks.at(-1), log };
    this.plot.classList.toggle("cut", left > this.data.left || right < this.data.right);
    this.marks(marks);
    const dots = [];
    for (const [index, line] of this.lines.entries()) {
      const places = line.map(([x, y]) => [this.across(x), this.down(y)]);
      this.paths[index].setAttribute("d", `M${places.map(([x, y]) => `${(1000 * x).toFixed(1)},${(1000 * y).toFixed(1)}`).join("L")}`);
      if (!this.data.curves[index].dots) continue;
      for (const [x, y] of places) {
        if (x < 0 || x > 1) continue;
        const dot = element("i", `dot ${this.data.curves[index].style}`);
        dot.style.left = `${100 * x}%`;
        dot.style.top = `${100 * y}%`;
        dots.push(dot);
      }
    }
    this.find(".dots").replaceChildren(...dots);
    if (this.kept) {
      const place = this.across(this.keptStep);
      this.kept.hidden = place < 0 || place > 1;
      this.kept.style.left = `${100 * place}%`;
      this.kept.classList.toggle("before", place > 0.5);
    }
  }

  marks(marks) {
    const wide = Math.max(1, Math.ceil(marks.length / 7));
    const vertical = [], lines = [], horizontal = [];
    for (const [index, mark] of marks.entries()) {
      if (index % wide) continue;
      const text = element("span", "", shown(mark));
      text.style.top = `${100 * this.down(mark)}%`;
      vertical.push(text);
      const line = this.find(".grid").cloneNode();
      for (const name of ["y1", "y2"]) line.setAttribute(name, 1000 * this.down(mark));
      lines.push(line);
    }
    for (const mark of ticks(this.frame.left, this.frame.right, 5)) {
      const place = this.across(mark);
      if (place < 0 || place > 1 || mark % 1) continue;
      const text = element("span", place > 0.96 ? "end" : "", mark.toLocaleString("en"));
      text.style.left = `${100 * place}%`;
      horizontal.push(text);
    }
    this.find(".y-marks").replaceChildren(...vertical);
    this.find(".lines").replaceChildren(...lines);
    this.find(".x-marks").replaceChildren(...horizontal);
  }

  stepAt(clientX) {
    const box = this.plot.getBoundingClientRect();
    const share = Math.max(0, Math.min(1, (clientX - box.left) / box.width));
    return this.frame.left + share * (this.frame.right - this.frame.left);
  }

  point(clientX) {
    const hair = this.find(".hair"), tip = this.find(".tip");
    const nearest = (points, step) =>
      points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
    const step = nearest(this.lines[0], this.stepAt(clientX))[0];
    const share = Math.max(0, Math.min(1, this.across(step)));
    hair.style.left = `${100 * share}%`;
    tip.replaceChildren(element("b", "", `step ${step.toLocaleString("en")}`));
    for (const [index, curve] of this.data.curves.entries()) {
      const found = nearest(this.lines[index], step);
      const where = found[0] === step ? "" : ` (step ${found[0].toLocaleString("en")})`;
      const text = curve.name ? `${curve.name} ${shown(found[1])}${where}` : shown(found[1]);
      tip.append(element("span", this.data.curves.length > 1 ? `key ${curve.style}` : "", text));
    }
    hair.hidden = tip.hidden = false;
    const width = this.plot.getBoundingClientRect().width, free = width - tip.offsetWidth;
    const wanted = share > 0.5 ? share * width - tip.offsetWidth - 12 : share * width + 12;
    tip.style.left = `${Math.max(0, Math.min(free, wanted))}px`;
  }

  leave() { this.find(".hair").hidden = this.find(".tip").hidden = true; }
}

const charts = [...document.querySelectorAll("[data-chart]")].map((figure) => new Chart(figure));
const tools = document.querySelector("[data-chart-tools]");
if (tools && charts.length) {
  const whole = tools.querySelector("[data-whole]");
  const zoom = (left, right) => {
    for (const chart of charts) chart.draw({ left: left ?? chart.data.left, right: right ?? chart.data.right });
    whole.hidden = left === undefined;
  };
  tools.hidden = false;
  tools.querySelector("[data-log]").addEventListener("change", (event) => {
    for (const chart of charts) chart.draw({ log: event.target.checked });
  });
  const slider = tools.querySelector("[data-smoothing]");
  slider.parentElement.hidden = !charts.some((chart) => chart.noisy);
  const say = () => { tools.querySelector("[data-smoothing-shown]").textContent = Number(slider.value) ? `${slider.value}×` : "off"; };
  slider.addEventListener("input", () => {
    say();
    for (const chart of charts) if (chart.noisy) chart.draw({ smoothing: Number(slider.value) });
    for (const note of document.querySelectorAll(".axis-note")) note.hidden = slider.value !== "1";
  });
  say();
  whole.addEventListener("click", () => zoom());
  for (const chart of charts) {
    let from = null;
    const picked = chart.find(".picked");
    chart.plot.addEventListener("pointerdown", (event) => { from = event.clientX; });
    chart.plot.addEventListener("pointermove", (event) => {
      chart.point(event.clientX);
      if (from === null || Math.abs(event.clientX - from) < 8) return;
      const box = chart.plot.getBoundingClientRect();
      const ends = [from, event.clientX].map((x) => Math.max(0, Math.min(box.width, x - box.left))).sort((a, b) => a - b);
      picked.style.left = `${ends[0]}px`;
      picked.style.width = `${ends[1] - ends[0]}px`;
      picked.hidden = false;
    });
    const end = (event) => {
      if (from !== null && event.type === "pointerup" && !picked.hidden) {
        const steps = [chart.stepAt(from), chart.stepAt(event.clientX)].sort((a, b) => a - b);
        if (steps[1] - steps[0] >= 2) zoom(Math.floor(steps[0]), Math.ceil(steps[1]));
      }
      from = null;
      picked.hidden = true;
      if (event.type !== "pointerup") chart.leave();
    };
    for (const name of ["pointerup", "pointerleave", "pointercancel"]) chart.plot.addEventListener(name, end);
    chart.plot.addEventListener("dblclick", () => zoom());
  }
}

const answerTools = document.querySelector("[data-answer-tools]");
if (answerTools) {
  const list = document.querySelector(".samples"), entries = [...list.children];
  const filter = answerTools.querySelector("[data-filter]"), sort = answerTools.querySelector("[data-sort]");
  const unfold = answerTools.querySelector("[data-unfold]");
  const arrange = () => {
    const key = sort.value.replace("-", ""), way = sort.value.startsWith("-") ? -1 : 1;
    entries.sort((a, b) => way * (Number(a.dataset[key]) - Number(b.dataset[key])) || a.dataset.index - b.dataset.index);
    for (const entry of entries) entry.hidden = filter.value !== "all" && !entry.dataset.kinds.split(" ").includes(filter.value);
    list.replaceChildren(...entries);
    answerTools.querySelector("[data-shown]").textContent = `${entries.filter((entry) => !entry.hidden).length} shown`;
  };
  answerTools.hidden = false;
  filter.addEventListener("change", arrange);
  sort.addEventListener("change", arrange);
  unfold.addEventListener("click", () => {
    const open = unfold.textContent === "Unfold all";
    for (const entry of entries) entry.open = open;
    unfold.textContent = open ? "Fold all" : "Unfold all";
  });
  arrange();
}

for (const button of document.querySelectorAll("[data-copy]")) {
  if (!navigator.clipboard) continue;
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.previousElementSibling.textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
