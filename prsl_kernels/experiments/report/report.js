// Sorting, filtering and the image browser. The page says everything without it; nothing here asks for anything, and
// text from the data only ever becomes a text node.
(() => {
  "use strict";

  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };

  // ---- tables -------------------------------------------------------------------------------------------------------

  const keyOf = (cell) => {
    const said = (cell.dataset.value ?? cell.textContent).trim().replace(/[−–]/g, "-").replace(/,/g, "");
    const number = Number.parseFloat(said.replace(/^[<>=~≤≥]\s*/, ""));
    return Number.isNaN(number) ? said.toLowerCase() : number;
  };

  const compare = (a, b) => {
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1; // what is no number comes last
    return a < b ? -1 : a > b ? 1 : 0;
  };

  const sortable = (table) => {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    const original = [...body.rows];
    heads.forEach((head, column) => {
      const button = make("button", { type: "button", className: "sort", title: "Sort by this column" });
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        const first = head.classList.contains("num") ? "descending" : "ascending";
        const second = first === "ascending" ? "descending" : "ascending";
        const next = before === first ? second : before === second ? null : first;
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        const rows = [...original];
        if (next) {
          head.setAttribute("aria-sort", next);
          const sign = next === "ascending" ? 1 : -1;
          const keys = new Map(rows.map((row) => [row, keyOf(row.cells[column])]));
          rows.sort((a, b) => {
            const [x, y] = [keys.get(a), keys.get(b)];
            return typeof x === typeof y ? sign * compare(x, y) : compare(x, y);
          });
        }
        body.append(...rows);
      });
    });
  };

  const filterable = (table) => {
    const rows = [...table.tBodies[0].rows];
    const status = make("output");
    const input = make("input", { type: "search", placeholder: "words in a row" });
    input.addEventListener("input", () => {
      const wanted = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      rows.forEach((row) => {
        const said = row.textContent.toLowerCase();
        row.hidden = !wanted.every((word) => said.includes(word));
      });
      status.textContent = wanted.length ? ` ${rows.filter((row) => !row.hidden).length} of ${rows.length} rows` : "";
    });
    table.closest(".scroll").before(make("label", { className: "filter" }, "Filter ", input, status));
  };

  document.querySelectorAll("table.sortable").forEach((table) => {
    if (table.tBodies.length !== 1 || table.tBodies[0].rows.length < 2) return;
    sortable(table);
    if (table.tBodies[0].rows.length > 8) filterable(table);
  });

  // ---- the image browser --------------------------------------------------------------------------------------------

  const MINUS = "\u2212";
  const thousandths = (value) => (value === null ? "–" : (value / 1000).toFixed(3).replace("-", MINUS));

  const loadPixels = async (source, factor) => {
    const image = new Image();
    image.src = source;
    await image.decode();
    const canvas = make("canvas", { width: image.naturalWidth, height: image.naturalHeight });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    return factor ? context.getImageData(0, 0, canvas.width, canvas.height) : canvas;
  };

  const magnified = async (before, after, factor, canvas) => {
    const [old, now] = await Promise.all([loadPixels(before, true), loadPixels(after, true)]);
    const shown = new ImageData(now.width, now.height);
    for (let i = 0; i < now.data.length; i += 4) {
      for (let channel = 0; channel < 3; channel += 1) {
        shown.data[i + channel] = 128 + factor * (now.data[i + channel] - old.data[i + channel]); // clamped by its type
      }
      shown.data[i + 3] = 255;
    }
    canvas.width = now.width;
    canvas.height = now.height;
    canvas.getContext("2d").putImageData(shown, 0, 0);
  };

  const browse = (root) => {
    const data = JSON.parse(document.getElementById(root.dataset.history).textContent);
    const part = (name) => root.querySelector(`[data-part="${name}"]`);
    const rowsOf = (image) => {
      const found = [];
      for (let row = data.start[image]; row < data.start[image + 1]; row += 1) found.push(row);
      return found;
    };
    const state = { order: data.images.map((_, index) => index), image: 0, round: null, drawn: 0 };
    const choice = { arm: part("arm"), attack: part("attack"), image: part("image"), order: part("order"),
                     find: part("find"), factor: part("factor") };
    data.arms.forEach((arm, index) => choice.arm.append(make("option", { value: index }, arm)));
    data.attacks.forEach((attack, index) => choice.attack.append(make("option", { value: index }, attack)));
    choice.arm.value = "0";
    choice.attack.value = String(data.primary);

    const history = (image, arm, attack) =>
      rowsOf(image).filter((row) => data.arm[row] === arm
        && (data.attack[row] === attack || (data.round[row] === 0 && data.attack[row] === data.primary)));
    const fall = (image) => {
      const rows = history(image, Number(choice.arm.value), Number(choice.attack.value));
      const first = data.score[rows[0]] ?? null;
      const last = data.score[rows[rows.length - 1]] ?? null;
      return rows.length < 2 || first === null || last === null ? Infinity : last - first;
    };
    const searchText = data.images.map((image, index) =>
      [image.id, image.group, image.question, ...image.references,
        ...new Set(rowsOf(index).map((row) => data.texts[data.text[row]]))].join("\n").toLowerCase());

    const list = () => {
      const wanted = choice.find.value.toLowerCase().trim();
      state.order = data.images.map((_, index) => index).filter((index) => searchText[index].includes(wanted));
      if (choice.order.value === "pictures") {
        const has = (index) => (data.images[index].picture ? 0 : 1);
        state.order.sort((a, b) => has(a) - has(b) || a - b);
      } else if (choice.order.value !== "data") {
        const sign = choice.order.value === "fall" ? 1 : -1;
        const falls = new Map(state.order.map((index) => [index, fall(index)]));
        state.order.sort((a, b) => {
          const [x, y] = [falls.get(a), falls.get(b)];
          return x === y ? a - b : x === Infinity ? 1 : y === Infinity ? -1 : sign * (x - y);
        });
      }
      choice.image.replaceChildren(...state.order.map((index) => {
        const image = data.images[index];
        const name = `${image.id}${image.picture ? " ▣" : ""} · ${image.question ?? image.references[0] ?? ""}`;
        return make("option", { value: index }, name.length > 90 ? `${name.slice(0, 90)} …` : name);
      }));
      if (!state.order.includes(state.image) && state.order.length) state.image = state.order[0];
      choice.image.value = String(state.image);
      part("found").textContent = state.order.length === data.images.length
        ? `${state.order.length} images` : `${state.order.length} of ${data.images.length} images`;
    };

    const pictures = async (row) => {
      const turn = (state.drawn += 1);
      const image = data.images[state.image];
      const after = data.pictures[row] ?? (data.round[row] === 0 ? image.picture : undefined);
      part("clean").hidden = !image.picture;
      part("changed").hidden = !after;
      part("noise").parentElement.hidden = !(image.picture && after);
      part("none").hidden = Boolean(image.picture && after);
      part("none").textContent = !image.picture ? "No pictures of this image are in the page."
        : after ? "" : "The picture of this round is not in the page.";
      if (image.picture) part("clean").querySelector("img").src = image.picture;
      if (!image.picture || !after) return;
      part("changed").querySelector("img").src = after;
      const canvas = part("noise");
      const fresh = make("canvas");
      await magnified(image.picture, after, Number(choice.factor.value), fresh);
      if (turn !== state.drawn) return; // another image was picked meanwhile
      canvas.width = fresh.width;
      canvas.height = fresh.height;
      canvas.getContext("2d").drawImage(fresh, 0, 0);
      part("times").textContent = `× ${choice.factor.value}`;
    };

    const show = () => {
      const image = data.images[state.image];
      const rows = state.order.length
        ? history(state.image, Number(choice.arm.value), Number(choice.attack.value)) : [];
      part("shown").hidden = !rows.length;
      part("empty").hidden = Boolean(rows.length);
      part("empty").textContent = state.order.length
        ? "This arm has no rows of this attack on this image." : "No image holds these words.";
      if (!rows.length) return;
      part("question").textContent = image.question ?? "";
      part("question").hidden = !image.question;
      part("references").replaceChildren(...image.references.flatMap((text) => [make("q", { dir: "auto" }, text), " "]));
      const worst = image.worst[choice.arm.value];
      part("worst").textContent = worst === undefined ? "" : `The worst of the ensemble for this arm: ${data.attacks[worst]}.`;
      part("id").textContent = `${image.id}${image.group ? ` · ${image.group}` : ""}`;
      if (!rows.includes(state.round)) state.round = rows[rows.length - 1];
      part("rounds").replaceChildren(...rows.map((row) => {
        const pick = make("input", { type: "radio", name: `${root.dataset.history}-round`, checked: row === state.round });
        pick.addEventListener("change", () => { state.round = row; pictures(row); });
        const said = data.round[row] === 0 && data.attack[row] === data.primary ? "clean" : `${data.round[row]}`;
        const number = (text) => make("td", { className: "num" }, text);
        return make("tr", {},
          make("th", { scope: "row" }, make("label", {}, pick, ` ${said}`)),
          make("td", { className: "wide" }, make("q", { dir: "auto" }, data.texts[data.text[row]])),
          number(thousandths(data.score[row])), number(thousandths(data.objective[row])),
          number(data.linf[row] === null ? "–" : (data.linf[row] / 10).toFixed(1)));
      }));
      pictures(state.round);
    };

    const step = (by) => {
      const place = state.order.indexOf(state.image) + by;
      if (place < 0 || place >= state.order.length) return;
      state.image = state.order[place];
      choice.image.value = String(state.image);
      state.round = null;
      show();
    };
    const relist = () => { list(); state.round = null; show(); };
    choice.image.addEventListener("change", () => { state.image = Number(choice.image.value); state.round = null; show(); });
    [choice.arm, choice.attack, choice.order].forEach((select) => select.addEventListener("change", relist));
    choice.find.addEventListener("input", relist);
    choice.factor.addEventListener("input", () => pictures(state.round));
    part("previous").addEventListener("click", () => step(-1));
    part("next").addEventListener("click", () => step(1));
    root.hidden = false;
    list();
    state.image = state.order[0];
    choice.image.value = String(state.image);
    show();
  };

  document.querySelectorAll("[data-history]").forEach(browse);
})();
