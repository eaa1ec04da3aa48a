// Uses the exported page as its reader would, and leaves what it saw in the title.
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const errors = [];
window.addEventListener("error", (event) => errors.push(String(event.message)));
window.addEventListener("unhandledrejection", (event) => errors.push(String(event.reason)));
const until = async (test) => {
  for (let i = 0; i < 100 && !test(); i++) await wait(50);
};

(async () => {
  await until(() => document.querySelector(".mk-grid canvas")?.width > 0);
  await wait(100);
  const seen = {};
  const find = (selector) => document.querySelector(selector);
  const inked = (canvas) => {
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let colours = new Set();
    for (let i = 0; i < data.length; i += 4) colours.add((data[i] << 16) | (data[i + 1] << 8) | data[i + 2]);
    return colours.size;
  };
  const grid = find(".mk-grid");
  const press = (key) => grid.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  const caption = () => find(".mk-caption").textContent;
  seen.title = find(".mk-title").textContent;
  seen.words = Array.from(document.querySelectorAll(".mk-word"), (word) => word.textContent);
  seen.gridColours = inked(find(".mk-grid canvas"));
  seen.largeColours = inked(find(".mk-large canvas"));
  press("Home");
  press("PageUp");
  seen.first = caption();
  press("ArrowRight");
  press("ArrowDown");
  seen.moved = caption();
  press("Enter");
  seen.chosen = caption();
  press("Escape");
  seen.none = caption();
  press("]");
  press("]");
  seen.locked = Array.from(document.querySelectorAll(".mk-word"), (word) => word.getAttribute("aria-pressed")).indexOf("true");
  const canvas = find(".mk-grid canvas");
  const box = canvas.getBoundingClientRect();
  const click = (x, y) => canvas.dispatchEvent(new MouseEvent("click", { clientX: box.left + x, clientY: box.top + y, bubbles: true }));
  click(30, 30);
  seen.clicked = caption();
  const before = find(".mk-large canvas").toDataURL();
  const maps = find(".mk-choices select");
  maps.value = maps.options[maps.options.length - 1].value;
  maps.dispatchEvent(new Event("change"));
  seen.map = maps.value;
  seen.repainted = find(".mk-large canvas").toDataURL() !== before;
  seen.errors = errors;
  seen.wide = document.documentElement.scrollWidth <= window.innerWidth;
  document.title = JSON.stringify(seen);
})();
