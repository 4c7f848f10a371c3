// Light or dark: what the system asks for, until the button says otherwise.
const button = document.getElementById("choose-theme");

function dress(dark) {
  document.documentElement.classList.toggle("dark", dark);
  button.textContent = dark ? "light" : "dark";
  button.hidden = false;
}

const system = matchMedia("(prefers-color-scheme: dark)");
dress(system.matches);
system.addEventListener("change", () => dress(system.matches));
button.addEventListener("click", () => dress(!document.documentElement.classList.contains("dark")));
