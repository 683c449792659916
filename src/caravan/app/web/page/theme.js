// Light or dark as chosen before, set before anything is drawn; without a choice the system decides.
document.documentElement.dataset.theme = localStorage.getItem("caravan-theme") ?? "system";
