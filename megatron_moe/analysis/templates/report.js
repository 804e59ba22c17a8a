// The plots of the report: each is drawn when it comes into view, with the colours of the page.
"use strict";
(() => {
  const ON_DARK = /*ON_DARK*/{};
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const wide = matchMedia("(min-width: 901px)");
  const figures = [...document.querySelectorAll("figure.plot")].map(read);
  const PRINTED = { "--text": "#000", "--grid": "#ddd", "--muted": "#444", "--raised": "#fff", "--line": "#ccc" };
  let printing = false;

  // A figure: its elements, the panel that is shown, and its data once they are read.
  function read(element) {
    const canvas = element.querySelector(".canvas");
    const select = element.querySelector("select");
    return { element, canvas, select, row: element.dataset.row, index: 0, content: null, drawn: false };
  }

  function content(figure) {
    if (!figure.content) {
      figure.content = JSON.parse(figure.element.querySelector("script").textContent);
    }
    return figure.content;
  }

  // A colour for a dark page: dark ones become lighter.
  function lifted(colour) {
    if (ON_DARK[colour]) return ON_DARK[colour];
    const found = /^#(..)(..)(..)$/.exec(colour);
    if (!found) return colour;
    const parts = found.slice(1).map((part) => parseInt(part, 16));
    const light = 0.3 * parts[0] + 0.6 * parts[1] + 0.1 * parts[2];
    const share = Math.max(0, 0.45 - light / 200);
    return `rgb(${parts.map((part) => Math.round(part + share * (255 - part))).join(",")})`;
  }

  // The colours of a trace for a dark page.
  function recoloured(value) {
    if (Array.isArray(value) || value === null || typeof value !== "object") return value;
    const made = {};
    for (const [key, part] of Object.entries(value)) {
      if (key === "color" && typeof part === "string") made[key] = lifted(part);
      else if (key === "color" && Array.isArray(part)) made[key] = part.map(lifted);
      else made[key] = ["marker", "line", "node", "error_y"].includes(key) ? recoloured(part) : part;
    }
    return made;
  }

  function layoutOf(panel, width) {
    const css = getComputedStyle(document.documentElement);
    const colour = (name) => (printing ? PRINTED[name] : css.getPropertyValue(name).trim());
    const text = colour("--text"), grid = colour("--grid"), line = colour("--muted");
    const narrow = width < 520;
    const axis = {
      gridcolor: grid, zerolinecolor: grid, linecolor: line, tickcolor: line, showline: true,
      ticks: "outside", ticklen: 4, tickfont: { size: narrow ? 10 : 12 },
    };
    const given = panel.layout;
    const joined = (own) => ({ ...axis, ...own, title: { ...own.title, standoff: 10, font: { size: narrow ? 11 : 13 } } });
    const legend = legendHeight(panel, width);
    const layout = {
      ...given,
      height: panel.square ? Math.min(Math.max(width - 70, 260), 560) : panel.height + legend,
      width,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: text },
      margin: { l: 12, r: 12, t: 14, b: 12 },
      legend: { orientation: "h", x: 0, y: 1.0, yanchor: "bottom", yref: "paper", font: { size: narrow ? 10 : 12 }, itemsizing: "constant" },
      hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--line"), font: { color: text } },
      hovermode: "closest", dragmode: narrow ? false : "zoom",
    };
    if (given.xaxis) layout.xaxis = joined(given.xaxis);
    if (given.yaxis) layout.yaxis = joined(given.yaxis);
    if (given.annotations) {
      const size = narrow ? 10 : 12;
      layout.annotations = given.annotations.map((each) => ({ ...each, font: { size } }));
      layout.margin = { l: 12, r: 12, t: 34, b: 12 };
    }
    if (panel.square) layout.margin.t = 24;
    if (given.polar) {
      const around = { ...given.polar.angularaxis, gridcolor: grid, linecolor: line, tickfont: { size: narrow ? 10 : 12 } };
      const radius = { ...given.polar.radialaxis, gridcolor: grid, linecolor: line, tickfont: { size: 10, color: line } };
      layout.polar = { bgcolor: "rgba(0,0,0,0)", angularaxis: around, radialaxis: radius };
      layout.margin = { l: 48, r: 48, t: 30, b: 44 };
      layout.legend.y = 1.08;
    }
    return layout;
  }

  // Pixels that the entries of a legend above the plot need, from the lengths of their names.
  function legendHeight(panel, width) {
    if (!panel.layout.showlegend) return 0;
    const names = panel.data.filter((trace) => trace.showlegend !== false).map((trace) => trace.name || "");
    for (const shape of panel.layout.shapes || []) if (shape.showlegend) names.push(shape.name);
    const longest = Math.max(...names.map((name) => name.length), 1);
    const columns = Math.max(1, Math.floor((width - 24) / (longest * 7 + 46)));
    return 20 * Math.ceil(names.length / columns) + 6;
  }

  function draw(figure) {
    const { canvas, index } = figure;
    const panel = content(figure).panels[index];
    const onDark = dark.matches && !printing;
    const data = onDark ? panel.data.map(recoloured) : panel.data;
    const file = figure.element.id;
    const config = {
      displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
      toImageButtonOptions: { format: "svg", filename: file },
    };
    figure.drawn = true;
    figure.width = canvas.clientWidth;
    return Plotly.react(canvas, data, layoutOf(panel, canvas.clientWidth), config).then(() => {
      canvas.style.minHeight = "";
      canvas.dataset.drawn = panel.name;
    });
  }

  function show(figure, index) {
    const { panels, files } = content(figure);
    figure.index = Math.min(Math.max(index, 0), panels.length - 1);
    figure.select.selectedIndex = figure.index;
    for (const button of figure.element.querySelectorAll("button")) {
      const next = figure.index + Number(button.dataset.step);
      button.disabled = next < 0 || next >= panels.length;
    }
    for (const link of figure.element.querySelectorAll("a[data-kind]")) {
      link.href = `${files[figure.index]}.${link.dataset.kind}`;
    }
    if (figure.drawn) draw(figure);
  }

  // Shows a panel, in the figures beside it too, or in all that have one of this name.
  function choose(figure, index) {
    show(figure, index);
    const name = content(figure).panels[figure.index].name;
    const all = document.getElementById("together").checked;
    for (const other of figures) {
      const linked = all ? content(other).selector === content(figure).selector : figure.row && other.row === figure.row;
      if (other === figure || !other.select || !linked) continue;
      const place = content(other).panels.findIndex((panel) => panel.name === name);
      if (place >= 0) show(other, place);
    }
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const figure = figures.find((each) => each.canvas === entry.target);
      if (entry.isIntersecting && !figure.drawn) draw(figure);
    }
  }, { rootMargin: "300px" });

  // Plots follow the width of the page; a legend of other lines changes their height as well.
  const resized = new ResizeObserver((entries) => {
    for (const entry of entries) {
      const figure = figures.find((each) => each.canvas === entry.target);
      if (figure.drawn && figure.canvas.clientWidth !== figure.width) {
        requestAnimationFrame(() => draw(figure));
      }
    }
  });

  for (const figure of figures) {
    seen.observe(figure.canvas);
    resized.observe(figure.canvas);
    if (!figure.select) continue;
    figure.select.selectedIndex = 0; // browsers keep choices when a page is loaded again
    figure.select.addEventListener("change", () => choose(figure, figure.select.selectedIndex));
    for (const button of figure.element.querySelectorAll("button")) {
      if (button.dataset.step === "-1") button.disabled = true;
      button.addEventListener("click", () => choose(figure, figure.index + Number(button.dataset.step)));
    }
    figure.canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      choose(figure, figure.index + step);
    });
  }

  // The contents are open beside the page, and closed above it.
  const contents = document.querySelector("nav details");
  const fold = () => { contents.open = wide.matches; };
  fold();
  wide.addEventListener("change", fold);
  for (const link of contents.querySelectorAll("a")) {
    link.addEventListener("click", () => { if (!wide.matches) contents.open = false; });
  }
  const links = new Map([...contents.querySelectorAll("li a")].map((a) => [a.getAttribute("href").slice(1), a]));
  const here = new IntersectionObserver((entries) => {
    for (const entry of entries) links.get(entry.target.id)?.classList.toggle("here", entry.isIntersecting);
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const section of document.querySelectorAll("main > section")) here.observe(section);

  const redraw = () => { for (const figure of figures) if (figure.drawn) draw(figure); };
  dark.addEventListener("change", redraw);
  addEventListener("beforeprint", () => { printing = true; for (const figure of figures) draw(figure); });
  addEventListener("afterprint", () => { printing = false; redraw(); });
})();
