"use strict";
// Rows move within their own part of a table: an unfinished layer never stands among the finished ones.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.value;
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // what does not exist comes last
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y, undefined, {numeric: true}) : x - y;
      return down ? -order : order;
    };
    for (const body of table.tBodies) body.append(...[...body.rows].sort(compare));
  }));
}

// Means over other layers, or over those that fewer runs share.
const over = document.getElementById("over");
if (over) {
  const {forms, runs} = JSON.parse(document.getElementById("data").textContent);
  const written = (value, form) => value === null ? "–"
    : form.endsWith("%") ? `${(100 * value).toFixed(Number(form.slice(1, -1)))}%` : value.toFixed(Number(form.slice(1, -1)));
  const rows = [...document.querySelector("#overview tbody").rows];
  const first = 3;  // before these come name, setting and layers
  const boxes = rows.map((row) => {
    const box = document.createElement("input");
    Object.assign(box, {type: "checkbox", checked: true, ariaLabel: "compare this run"});
    row.cells[0].prepend(box, " ");
    box.addEventListener("change", show);
    return box;
  });
  function show() {
    const chosen = runs.filter((run, n) => boxes[n].checked && Object.keys(run).length);
    const sites = over.value ? [over.value] : Object.keys(chosen[0] ?? {}).filter((site) => chosen.every((run) => site in run));
    document.getElementById("now").textContent = sites.length > 3 ? `${sites.length} layers` : sites.join(", ") || "none";
    rows.forEach((row, n) => forms.forEach((form, k) => {
      const cell = row.cells[first + k];
      const values = boxes[n].checked && sites.every((site) => site in runs[n])
        ? sites.map((site) => runs[n][site][k]).filter((value) => value !== null) : [];
      const mean = values.length ? values.reduce((a, b) => a + b) / values.length : null;
      cell.className = "";  // its colour was of other layers
      cell.textContent = written(mean, form);
      cell.dataset.value = mean ?? "";
    }));
  }
  over.addEventListener("change", show);
}
