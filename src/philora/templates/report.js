"use strict";
// Values under the pointer, and the copy button. The page reads the same without it.
for (const figure of document.querySelectorAll("[data-chart]")) {
  const data = JSON.parse(figure.dataset.chart);
  const plot = figure.querySelector(".plot");
  const hair = figure.querySelector(".hair");
  const tip = figure.querySelector(".tip");
  const nearest = (points, step) =>
    points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
  const line = (tag, className, text) => {
    const element = document.createElement(tag);
    element.className = className;
    element.textContent = text;
    return element;
  };
  const hide = () => { hair.hidden = tip.hidden = true; };
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const wanted = data.left + ((event.clientX - box.left) / box.width) * (data.right - data.left);
    const step = nearest(data.curves[0].points, wanted)[0];
    const share = (step - data.left) / (data.right - data.left);
    hair.style.left = `${100 * share}%`;
    tip.replaceChildren(line("b", "", `step ${step.toLocaleString("en")}`));
    for (const curve of data.curves) {
      const point = nearest(curve.points, step);
      const where = point[0] === step || (curve.style !== "eval" && !curve.style.startsWith("run-")) ? "" : ` (step ${point[0].toLocaleString("en")})`;
      const text = curve.name ? `${curve.name} ${point[2]}${where}` : point[2];
      tip.append(line("span", data.curves.length > 1 ? `key ${curve.style}` : "", text));
    }
    hair.hidden = tip.hidden = false;
    const room = box.width - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(room, share > 0.5 ? share * box.width - tip.offsetWidth - 12 : share * box.width + 12))}px`;
  });
  plot.addEventListener("pointerleave", hide);
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
