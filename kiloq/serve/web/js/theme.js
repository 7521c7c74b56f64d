// Light or dark, list or no list, before anything is drawn. A plain script, not a module: modules run too late.

(() => {
  const root = document.documentElement;
  const read = (name, fallback) => {
    try {
      return JSON.parse(localStorage.getItem(name)) ?? fallback;
    } catch {
      return fallback;
    }
  };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let choice = read("kiloq.theme", "auto");
  const show = () => {
    root.dataset.theme = choice === "auto" ? (dark.matches ? "dark" : "light") : choice;
  };
  dark.addEventListener("change", show);
  root.addEventListener("kiloq-theme", (event) => {
    choice = event.detail;
    show();
  });
  show();
  root.classList.toggle("sidebar-closed", read("kiloq.sidebarClosed", false));
})();
