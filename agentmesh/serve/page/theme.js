"use strict";
// Light or dark as the reader chose, set before anything is drawn.
{
  const root = document.documentElement;
  const chosen = localStorage.getItem("agentmesh-theme");
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const other = () => ((root.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark" ? "light" : "dark");
    const label = () => (button.textContent = other() === "dark" ? "☾ dark" : "☀ light");
    button.addEventListener("click", () => {
      root.dataset.theme = other();
      localStorage.setItem("agentmesh-theme", root.dataset.theme);
      label();
    });
    dark.addEventListener("change", label);
    label();
  });
}
