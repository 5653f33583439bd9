import pytest
from django.contrib.auth.models import User


@pytest.mark.django_db
def test_database():
    User.objects.create(username="somebody")
    assert User.objects.count() == 1


@pytest.mark.django_db
def test_is_rolled_back():
    assert User.objects.count() == 0


def test_has_no_database():
    User.objects.count()


def test_client(client):
    assert client.get("/word/").content == b"a word"


def test_mail(mailoutbox):
    from django.core.mail import send_mail

    send_mail("a", "b", "here@example.com", ["there@example.com"])
    assert [mail.subject for mail in mailoutbox] == ["a"]
